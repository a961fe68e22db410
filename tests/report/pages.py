"""A page, read for what a test asks of it."""

from __future__ import annotations

from html.parser import HTMLParser

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Tags of a page, checked to be nested well; `sections` holds the words of each."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.ids, self.links, self.words = [], [], set(), [], []
        self.sections, self.inside = {}, None
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids |= {attributes.get("id")}
        self.links += [attributes[k] for k in ("href", "src") if k in attributes]
        if tag == "section":
            self.inside = attributes.get("id", "answer")
            self.sections[self.inside] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.inside:
            self.sections[self.inside] += f"{data} "

    def check_harmless(self):
        """Nothing of a user became markup, and nothing is asked for."""
        assert not {tag for tag, _ in self.tags} & {"script", "iframe", "object", "b>label"}
        assert all(a["src"].startswith("data:image/jpeg;base64,") and a["alt"] for tag, a in self.tags if tag == "img")
        heard = [attributes for tag, attributes in self.tags if tag == "audio"]
        assert all(a["src"].startswith("data:audio/wav;base64,") and a["aria-label"] for a in heard)
        assert not any(name.startswith("on") for _, attributes in self.tags for name in attributes)
        known = ("#", "data:,", "data:image/jpeg;base64,", "data:audio/wav;base64,")
        assert all(link.startswith(known) for link in self.links)
