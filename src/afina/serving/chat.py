"""A conversation as the tokens that the run was trained to answer.

What a user types is text, whatever it says: `<|im_end|>` in a message is those letters and not the token that ends a turn.
So where a message holds a control token's name, the rendered conversation is cut at the control tokens that the template
itself has put there, and what stands between is tokenised without looking for any. Everywhere else it is tokenised as
`afina predict` does it; both ways give the same tokens for a text without control tokens, which a test holds them to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from afina.data.example import Example
from afina.data.made import in_cell
from afina.errors import AfinaError
from afina.serving.models import Served
from afina.serving.request_error import RequestError
from afina.serving.schemas import Message
from afina.tasks.causal_lm import CausalLM
from afina.tasks.prompts import Prompts
from afina.tasks.task import NO_LIMIT

__all__ = ["chat_tokens", "conversation", "safe_tokens"]

_MARK = "\ue002{}\ue003"  # letters for private use, which no text of a person holds


def conversation(served: Served, messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as the run's rows had them: cleaned as the training rows were, without white space around them.

    Raises RequestError where the model cannot answer them.
    """
    task = served.task
    if not isinstance(task, CausalLM):
        said = f"{served.name} is a model for {task.name}, which holds no conversations; {_elsewhere(served)}"
        raise RequestError(400, said, param="model")
    if task.prompts is None:
        said = f"{served.name} was trained on text without turns; ask /v1/completions to continue one"
        raise RequestError(400, said, param="model")
    if not served.tuned and task.learned.get("template") != "own":
        raise RequestError(
            400, f"{served.name} has no chat template, so it is not known how to put questions; use /v1/completions",
            param="model",
        )  # fmt: skip
    made = []
    for number, message in enumerate(messages):
        said = message.said
        if served.tuned:
            said = in_cell(said, task.kind.columns["text"], served.run.recipe.data.clean)
        if not said.strip():
            raise RequestError(400, f"messages[{number}].content is empty", param="messages")
        role = "system" if message.role == "developer" else message.role
        made.append({"role": role, "content": said.strip()})
    if made[-1]["role"] != "user":
        said = f"the last message is of the {made[-1]['role']}; expected one of the user to answer"
        raise RequestError(400, said, param="messages")
    return made


def _elsewhere(served: Served) -> str:
    if served.lane.writes:
        return "ask /v1/completions"
    return "ask /v1/embeddings" if served.task.task_type == "FEATURE_EXTRACTION" else "ask /classify"


def chat_tokens(served: Served, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids up to where the answer begins. Raises RequestError where the template refuses the messages."""
    task: Any = served.task
    names = _control_names(task.tokenizer)
    try:
        if any(name in message["content"] for message in messages for name in names):
            return safe_tokens(task.tokenizer, task.prompts, messages, task.begin)
        asked = Example(messages[-1]["content"], "", 1, [dict(message) for message in messages])
        return list(task.encode([asked], NO_LIMIT, NO_LIMIT).features[0]["input_ids"])
    except AfinaError as error:
        raise RequestError(400, str(error), param="messages") from None


def _control_names(tokenizer: Any) -> list[str]:
    """Names of control tokens, the longest first."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)


def safe_tokens(tokenizer: Any, prompts: Prompts, messages: Sequence[dict[str, str]], begin: int | None) -> list[int]:
    """The same, with control tokens where the template put them and nowhere else.

    Raises RequestError where that cannot be told.
    """
    marks = [_MARK.format(i) for i in range(len(messages))]
    whole = prompts.question(messages)
    rest, around = prompts.question([{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]), list[str]()
    for mark in marks:
        before, found, rest = rest.partition(mark)
        around.append(before if found and mark not in rest else "\ue002")
    pieces: list[tuple[str, bool]] = []  # text, and whether the template wrote it
    for before, message in zip(around, messages, strict=True):
        pieces += [(before, True), (message["content"], False)]
    pieces.append((rest, True))
    if "".join(text for text, _ in pieces) != whole:
        raise RequestError(
            400, "a message holds the name of a control token of this model, and its chat template does not show messages "
            "as they are, so the two cannot be told apart; leave the name out", param="messages",
        )  # fmt: skip
    control = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    names = _control_names(tokenizer)
    pattern = re.compile("|".join(map(re.escape, names)))
    runs, special = [""], list[str]()  # stretches of text, and the control tokens between them
    for text, own in pieces:
        place = 0
        for match in pattern.finditer(text) if own else ():
            runs[-1] += text[place : match.start()]
            special.append(match[0])
            runs.append("")
            place = match.end()
        runs[-1] += text[place:]
    ids: list[int] = []
    for i, text in enumerate(runs):
        front, behind = special[i - 1] if i else "", special[i] if i < len(special) else ""
        if getattr(control.get(front), "rstrip", False):  # the token takes the white space beside it
            text = text.lstrip()
        if getattr(control.get(behind), "lstrip", False):
            text = text.rstrip()
        if text:
            ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if behind:
            ids.append(tokenizer.convert_tokens_to_ids(behind))
    wanted = [tokenizer.convert_tokens_to_ids(name) for name in special]
    forbidden = {tokenizer.convert_tokens_to_ids(name) for name in names} - {tokenizer.unk_token_id}
    if [i for i in ids if i in forbidden] != [i for i in wanted if i in forbidden]:
        raise RequestError(
            400, "a message holds the name of a control token of this model, which its tokenizer knows no other way to "
            "write; leave the name out", param="messages",
        )  # fmt: skip
    count = next((i for i, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
    return [tokenizer.bos_token_id] * bool(count or begin is not None) + ids[count:]
