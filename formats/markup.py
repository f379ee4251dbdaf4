r"""What of a document is prose, and what is code, a formula, a link, markup or an emoji.

    parse(text, fits)      [(TEXT, KEEP or GAP, string)]: the strings joined are the text
    hide(segment)          "see `ls -l` now" -> "see [0] now" and ["`ls -l`"]; show() puts them back
    prose(text)            what a reader reads: no code, links, formulas, tags, table rules

First the *spans* are found that come back as they are, from left to right. Then what is between them is
split: lines, table cells, sentences. Rules: CommonMark 0.31 for code, GitHub's for tables, pandoc's for $x$.

Indented lines are prose, not code: of ten indented paragraphs in real replies nine are items of a list.

Documents are written by strangers, so every step takes time linear in the text: no pattern reads the same
stretch from many starts, and the places where a span may end are listed once, before any span begins.
"""

import re
import string
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property

TEXT, KEEP, GAP = "text", "keep", "gap"  # to translate; as it is; white space between sentences

RAW = "script|style|pre|code|samp|kbd|textarea|svg|math"   # elements whose content is no prose
# Symbols that are pictures: arrows, clocks, boxes, stars, dingbats, emoji, flags, skin tones.
PICTURE = (r"\u2190-\u21FF\u2300-\u23FF\u2460-\u24FF\u2500-\u27BF\u2900-\u297F\u2B00-\u2BFF"
           r"\U0001F000-\U0001FAFF")
LETTERLIKE = "©®‼⁉™ℹ〰〽㊗㊙"   # pictures only with U+FE0F behind them
JOINED = "\uFE0E\uFE0F\u200D\u20E3\U000E0020-\U000E007F"   # what follows a picture and belongs to it
MONEY = r"\d[\d.,]*[A-Za-z]{0,2}\s+[A-Za-z]{2}"              # behind a $: an amount and a word
URL_STOP = r"\s<>()\[\]|\\\"`“”‘’«»、。，；：！？（）「」『』【】《》"

# What begins a span. A named one lasts until a place that `span_end` looks up; the others are whole.
OPENER = re.compile(rf"""
    (?P<fence> ^[ \t>]*(?:(?:[-*+]|\d{{1,9}}[.)])[ \t]+)? (?P<mark> `{{3,}}(?=[^`\n]*$) | ~{{3,}}) [^\n]*)
  | (?P<ticks> `+)
  | (?P<display> \$\$)
  | (?P<bracket> \\[\[(])
  | (?P<environment> \\begin\{{(?P<name>\w+\*?)\}})
  | (?P<comment> <!--)
  | (?P<data> <!\[CDATA\[)
  | (?P<program> <\?(?:php|xml|=))
  | (?P<element> <(?P<tag>(?i:{RAW}))(?:\s[^<>]*)?>)
  | <[A-Za-z][\w:-]*(?:\s+[\w:@.-]+\s*=\s*(?:"[^"]*"|'[^']*'))+\s*/?>    # a tag, perhaps on several lines
  | <[A-Za-z/!|%][^<>\n]*>                                               # any other, and <placeholders>
  | &(?:\#\d{{1,7}}|\#[xX][\da-fA-F]{{1,6}}|[A-Za-z][A-Za-z\d]{{1,31}});
  | (?<![A-Za-z0-9$\\])\$(?![\s$]|{MONEY})[^$\\\n]*(?:\\.[^$\\\n]*)*(?<!\s)\$(?![\d$])
  | (?<![A-Za-z0-9])(?i:https?://|ftp://|mailto:|www\.)
    [^{URL_STOP}]*(?:\([^\s<>()]*\)[^{URL_STOP}]*)*(?<![.,;:!?'*])        # no stop at its end, ( ) in pairs
  | \]\((?:[^()\s]|\([^()\s]*\))+(?:[ \t]+"[^"\n]*")?\)               # the second half of [text](url "title")
  | \]\[[^\[\]\n]{{0,99}}\]                                              # and of [text][label]
  | ^[ ]{{0,3}}\[[^\[\]\n]{{1,99}}\]:(?=[ \t]) | \[\^[^\[\]\s]{{1,99}}\]:?     # [label]: url, footnotes[^1]
  | (?<![A-Za-z0-9])[A-Za-z]:\\(?![\s\\])[^\s<>:"|?*`“”‘’,;，。；、]*(?<![.!)])     # a path on Windows
  | (?<![A-Za-z0-9_.+-])[A-Za-z0-9_.+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+
  | \{{\{{[^{{}}\n]*\}}\}} | \{{%[^{{}}\n]*%\}} | \$?\{{[\w .-]+\}} | \[\d{{1,6}}\] | %[sd]\b | \\\|
  | (?:[0-9\#*]\uFE0F?\u20E3|[{LETTERLIKE}]\uFE0F|[{PICTURE}][{JOINED}]*)+
""", re.VERBOSE | re.MULTILINE)
# What may end one.
CLOSER = re.compile(rf"\n|`+|\$\$|\\[\])]|-->|\]\]>|\?>|\\end\{{(\w+\*?)\}}|</({RAW})\s*>", re.IGNORECASE)
BLANK_LINE = re.compile(r"\n[ \t]*(?=\r?\n)")

NEWLINE, PIPE = re.compile(r"\r?\n"), re.compile(r"(?<!\\)\|")
WORD, LETTER_OR_DIGIT = re.compile(r"[^\W\d_]"), re.compile(r"\w")
QUOTED = re.compile(r"[ \t>]*")
TABLE_RULE = re.compile(r"[ \t>]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t\r]*")
# Kept at the start of a line: indentation, quote marks, headings, list markers, check boxes, numbers.
MARKER = re.compile(r"\s*(?:(?:[-*+•–>]|#{1,6}|\(?\d{1,3}[.):]|\(?[A-Za-z][.)]|\[[ xX]\])(?:\s+|$))*")
# A run of stops is tried at its first one alone; the last stops need no space after them.
SENTENCE_END = re.compile(r"(?:(?<![.!?…؟।۔።])[.!?…؟।۔።]+[\"'”’)\]*_]*(?=\s)"
                          r"|[。！？။។](?![。！？။។])[”’」』）]*)\s*(?=\S)")
FIRST_LETTER = re.compile(r"[\"'“‘(\[*_¿¡]*(\S)")
NOT_AN_END = set("Mr Mrs Ms Dr Prof St vs etc e.g i.e cf al No Fig Jr Sr Inc Ltd Co approx Vol pp".split())
LONGEST_ABBREVIATION = 12   # characters, with what may stand before one
CLAUSE_END, SPACE = re.compile(r"[;:,，、；：]\s*"), re.compile(r"\s+")
EDGES = string.whitespace + string.punctuation + "\u00a0\u3000«»‘’‚‛“”„‟…、。〈〉《》「」『』【】〔〕！（），．：；？"
MARK = re.compile(r"[\[［【]\s*(\d{1,6})\s*[\]］】]")

Place = tuple[int, int]      # start, end
Places = list[Place]         # in order
Piece = tuple[str, int, int]  # kind, start, end
Fits = Callable[[str], bool]  # is a segment short enough? Its spans are marks


# ---- spans ----

def from_place(places: Places, start: int) -> Place | None:
    """The first of the places that begins at `start` or later."""
    i = bisect_left(places, (start,))
    return places[i] if i < len(places) else None


def find_closers(text: str) -> dict[str, Places]:
    """Where a span may end, by what ends it: "\n", "``", "code", "pmatrix", a blank line, ..."""
    closers = defaultdict(list)
    for match in CLOSER.finditer(text):
        key = match[1] or (match[2] or match[0]).lower()
        closers[key].append(match.span())
    closers["blank line"] = [match.span() for match in BLANK_LINE.finditer(text)]
    return closers


def fence_end(opener: re.Match) -> int:
    """The end of the line that closes a fence: a fence of the same character, at least as long. One in a
    quote ends with the quote."""
    mark = opener["mark"]
    closing = rf"^[ \t>]*{mark[0]}{{{len(mark)},}}[ \t\r]*$"
    if opener[0].lstrip().startswith(">"):
        closing += r"|\n(?![ \t]*>)"
    found = re.compile(closing, re.MULTILINE).search(opener.string, opener.end())
    return found.end() if found else len(opener.string)


def span_end(match: re.Match, closers: dict[str, Places]) -> int | None:
    """Where the span ends that this opener begins; None if it begins none."""
    kind, text, start = match.lastgroup, match.string, match.end()
    if kind is None:
        return start
    if kind == "fence":
        return fence_end(match)
    limit, unclosed = None, None        # what the span may not cross; where it ends if nothing closes it
    if kind == "ticks":
        key, long = match[0], len(match[0]) > 2
        limit, unclosed = (None, len(text)) if long else ("\n", None)
    elif kind == "display":
        key, limit = "$$", "blank line"
    elif kind == "bracket":
        key, limit = ("\\]", None) if match[0] == "\\[" else ("\\)", "blank line")
    elif kind == "environment":
        key, unclosed = match["name"], start
    elif kind == "element":
        key = match["tag"].lower()
        block = key in ("script", "style", "pre") and NEWLINE.match(text, start)
        unclosed = len(text) if block else start    # "the <pre> tag" is a word in a sentence
    else:
        key, unclosed = {"comment": "-->", "data": "]]>", "program": "?>"}[kind], len(text)
    closing = from_place(closers[key], start)
    border = from_place(closers[limit], start) if limit else None
    if closing is None or border and border < closing:
        return unclosed
    return closing[1]


def find_spans(text: str) -> Places:
    """What comes back as it is: neighbours are one."""
    closers, spans, at = find_closers(text), [], 0
    while match := OPENER.search(text, at):
        end, at = span_end(match, closers), match.end()
        if end is None:
            continue
        if spans and spans[-1][1] == match.start():
            spans[-1] = spans[-1][0], end
        else:
            spans.append((match.start(), end))
        at = end
    return spans


class Document:
    """A text and its spans."""

    def __init__(self, text: str):
        self.text, self.spans = text, find_spans(text)

    def cover(self, place: int) -> Place | None:
        """The span that has this place in its inside: one may not cut there."""
        i = bisect_left(self.spans, (place,)) - 1
        return self.spans[i] if i >= 0 and place < self.spans[i][1] else None

    def split(self, start: int, end: int) -> list[str]:
        """[text, span, text, ..., text] of a stretch."""
        parts, at = [], start
        inside = slice(bisect_left(self.spans, (start,)), bisect_left(self.spans, (end,)))
        for first, last in self.spans[inside]:
            parts += [self.text[at:first], self.text[first:last]]
            at = last
        return [*parts, self.text[at:end]]

    def masked(self, start: int, end: int) -> str:
        """A stretch with [0], [1], ... for its spans."""
        return mask(self.split(start, end))

    @cached_property
    def lines(self) -> Places:
        """Without line ends; a span of several lines is no line but ends one."""
        blocks = [span for span in self.spans if "\n" in self.text[span[0]:span[1]]]
        lines, at = [], 0
        for first, last in [*blocks, (len(self.text), len(self.text))]:
            for match in NEWLINE.finditer(self.text, at, first):
                lines.append((at, match.start()))
                at = match.end()
            lines.append((at, first))
            at = last
        return lines

    def pipes(self, start: int, end: int) -> list[int]:
        """Where the cells of a line part."""
        return [match.start() for match in PIPE.finditer(self.text, start, end)
                if not self.cover(match.start())]


def mask(parts: list[str]) -> str:
    return "".join(f"[{i // 2}]" if i % 2 else part for i, part in enumerate(parts))


def split_spans(segment: str) -> list[str]:
    """[text, span, text, ..., text]."""
    return Document(segment).split(0, len(segment))


def hide(segment: str) -> tuple[str, list[str]]:
    """The segment with [0], [1], ... for its spans, and the spans. Most models copy such marks."""
    parts = split_spans(segment)
    return mask(parts), parts[1::2]


def split_edges(text: str) -> tuple[str, str, str]:
    """(before, core, after): the spaces and the punctuation at both ends of a text beside a span."""
    core = text.strip(EDGES)
    start = len(text) - len(text.lstrip(EDGES))
    return text[:start], core, text[start + len(core):]


def show(text: str, spans: list[str]) -> str | None:
    """Put the spans back; None unless every mark is there exactly once."""
    parts = MARK.split(text) if spans else [text]
    if sorted(map(int, parts[1::2])) != list(range(len(spans))):
        return None
    return "".join(spans[int(part)] if i % 2 else part for i, part in enumerate(parts))


# ---- tables ----

def cell_count(document: Document, line: Place) -> int:
    """Cells of a line if it is a table's row; the pipes at its ends make none."""
    inner = document.text[slice(*line)].strip(" \t>\r")
    pipes = document.pipes(*line)
    return len(pipes) + 1 - inner.startswith("|") - (inner.endswith("|") and len(pipes) > 1)


def is_rule(document: Document, line: Place) -> bool:
    """Whether a line is |---|:--:|, which makes a table of the line above and those below."""
    return "|" in document.text[slice(*line)] and bool(TABLE_RULE.fullmatch(document.text, *line))


def boxed_row(document: Document, line: Place) -> str | None:
    """Whether a line may be a row without a rule nearby: pipes at both ends, several cells, words in all that
    are not empty. "padded" if | all | cells | have spaces around them, "tight" if |none|begins|with one|,
    else None: |x| + |y| and |x| and |y| and Haskell's guards are no rows."""
    text, pipes = document.text, document.pipes(*line)
    start = QUOTED.match(text, *line).end()
    if len(pipes) < 3 or pipes[0] != start or text[pipes[-1] + 1:line[1]].strip():
        return None
    cells = [text[first + 1:last] for first, last in zip(pipes, pipes[1:])]
    filled = [cell for cell in cells if cell.strip()]
    if not all(LETTER_OR_DIGIT.search(cell) for cell in filled):
        return None
    if all(cell[0] == cell[-1] == " " for cell in filled):
        return "padded"
    return None if any(cell[0] == " " for cell in filled) else "tight"


def find_rows(document: Document) -> set[int]:
    """Which lines are rows of tables, by number."""
    lines, rows = document.lines, set()
    has_pipe = [bool(document.pipes(*line)) for line in lines]

    def row_follows(i: int) -> bool:
        if i + 1 == len(lines) or not has_pipe[i + 1]:
            return False
        between = document.text[lines[i][1]:lines[i + 1][0]]
        return NEWLINE.fullmatch(between) is not None  # and no code in between

    for i, line in enumerate(lines):
        if i in rows or not has_pipe[i]:
            continue
        follows = i > 0 and has_pipe[i - 1] and row_follows(i - 1)
        same = follows and cell_count(document, lines[i - 1]) == cell_count(document, line)
        style = boxed_row(document, line)
        if same and is_rule(document, line):
            last = i
            while row_follows(last):
                last += 1
            rows.update(range(i - 1, last + 1))
        elif style == "padded":
            rows.add(i)
        elif style == "tight" and same and boxed_row(document, lines[i - 1]) == "tight":
            rows.update((i - 1, i))
    return rows


# ---- sentences ----

def sentence_ends(document: Document, start: int, end: int) -> Iterator[int]:
    """Where sentences end, each with the white space after it. None ends inside a span, after an abbreviation
    or an initial, or before a small letter."""
    text, first = document.text, start
    for match in SENTENCE_END.finditer(text, start, end):
        stop = match.end()
        window = text[max(first, match.start() - LONGEST_ABBREVIATION):match.start()]
        word = window.split()[-1].lstrip("\"'“‘([") if window.strip() else ""
        initial = len(word) == 1 and word.isupper() and word != "I"
        short = match[0].strip() == "." and (initial or word in NOT_AN_END)
        after = FIRST_LETTER.match(text, stop, end)
        small = after and after[1].islower()
        if not (short or small or document.cover(stop)):
            yield stop
            first = stop
    yield end


def cut(document: Document, start: int, end: int, fits: Fits) -> list[int]:
    """Ends of the parts of a sentence, which is halved at the clause or word end nearest its middle until
    every part fits."""
    if end - start < 2 or fits(document.masked(start, end)):
        return [end]
    middle, half = (start + end) // 2, (end - start) // 2
    place = (nearest(document, CLAUSE_END, middle, half // 2) or nearest(document, SPACE, middle, half)
             or middle)
    if span := document.cover(place):
        place = span[0] if span[0] > start else span[1]
    if not start < place < end:
        return [end]
    return cut(document, start, place, fits) + cut(document, place, end, fits)


def nearest(document: Document, pattern: re.Pattern, middle: int, reach: int) -> int | None:
    """The end of the pattern's match that is nearest the middle, less than `reach` from it, outside spans."""
    radius = 0
    while radius < reach:
        radius = min(max(64, 4 * radius), reach)
        ends = [match.end() for match in pattern.finditer(document.text, middle - radius, middle + radius)]
        places = [end for end in ends if abs(end - middle) < radius and not document.cover(end)]
        if places:
            return min(places, key=lambda place: abs(place - middle))
    return None


# ---- documents ----

def pieces(document: Document, fits: Fits) -> Iterator[Piece]:
    """Everything in a document, in order."""
    rows, at = find_rows(document), 0
    for i, (start, end) in enumerate(document.lines):
        yield KEEP, at, start
        borders = document.pipes(start, end) if i in rows else []
        for pipe in borders:
            yield from pieces_of_line(document, start, pipe, fits)
            yield KEEP, pipe, pipe + 1
            start = pipe + 1
        yield from pieces_of_line(document, start, end, fits)
        at = end
    yield KEEP, at, len(document.text)


def pieces_of_line(document: Document, start: int, end: int, fits: Fits) -> Iterator[Piece]:
    """The same of a line or a table's cell: what it begins with, its sentences, the spaces behind them."""
    text = document.text
    if not WORD.search(text, start, end):
        yield KEEP, start, end
        return
    first = MARKER.match(text, start, end).end()
    last = max(first, start + len(text[start:end].rstrip()))
    yield KEEP, start, first
    for stop in sentence_ends(document, first, last):
        for place in cut(document, first, stop, fits):
            piece = text[first:place]
            body_start = first + len(piece) - len(piece.lstrip())
            body_end = max(body_start, first + len(piece.rstrip()))
            words = WORD.search(document.masked(body_start, body_end))
            yield GAP, first, body_start
            yield TEXT if words else KEEP, body_start, body_end
            yield GAP, body_end, place
            first = place
    yield KEEP, last, end


def parse(text: str, fits: Fits) -> list[tuple[str, str]]:
    """[(kind, string)], whose strings joined are `text`. fits(segment, with marks for its spans): is it short
    enough?"""
    return [(kind, text[start:end]) for kind, start, end in pieces(Document(text), fits) if end > start]


def prose(text: str) -> str:
    """What is left of a text for a reader: no code, links, addresses, formulas, tags, emoji, table rules. A
    space or a line break stands for what is left out."""
    document, parts = Document(text), []
    for kind, start, end in pieces(document, lambda segment: True):
        if kind == TEXT:
            parts.append(" ".join(document.split(start, end)[::2]))
        elif end > start:
            parts.append("\n" if "\n" in text[start:end] else " ")
    return "".join(parts)
