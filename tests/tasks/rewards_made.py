"""Rewards for tests: how often the first word of a prompt comes, and ways to go wrong."""


def repeats_first(completions, prompts):
    return [text.split().count(prompt.split()[0]) for text, prompt in zip(completions, prompts, strict=True)]


def w_words(completions, **_):
    numbers = [[int(word[1:]) for word in text.split() if word[:1] == "w" and word[1:].isdigit()] for text in completions]
    return [sum(number < 13 for number in row) for row in numbers]


def fails(completions):
    return [1 / len(text.split("never")[1]) for text in completions]


def always(completions):
    return [0.1] * len(completions)


_CALLS = []


def at_first(completions):
    _CALLS.append(len(completions))
    return [float(i) for i in range(len(completions))] if len(_CALLS) == 1 else always(completions)


def too_few(completions):
    return [0.0] * (len(completions) - 1)


def no_number(completions):
    return [float("nan")] * len(completions)


def words(completions):
    return ["good"] * len(completions)


def asks_more(completions, mood):
    return [0.0] * len(completions)
