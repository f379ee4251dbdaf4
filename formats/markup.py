r"""What of a document is prose, and what is code, a formula, a link, markup or an emoji.

    parse(text, fits)      [(TEXT, KEEP or GAP, string)]: the strings joined are the text
    hide(segment)          "see `ls -l` now" -> "see [0] now" and ["`ls -l`"]; unhide() puts them back
    prose(text)            what a reader reads: no code, links, formulas, tags, table rules

First the *spans* are found that come back as they are, from left to right. In the *flat* text one character
stands for each, so that nothing below can cut one or find a mark in it: it is split into lines, table cells
and sentences, and then the spans go back to their places.
Rules: CommonMark 0.31 for code, GitHub's for tables, pandoc's for $x$.

Indented lines are prose, not code: of ten indented paragraphs in real replies nine are items of a list. Code
without a fence is told by what its lines look like.

Documents are written by strangers, so every step takes time linear in the text: no pattern reads the same
stretch from many starts, and the places where a span may end are listed once, before any span begins.
"""

import contextlib
import itertools
import json
import re
import string
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from math import inf

TEXT, KEEP, GAP = "text", "keep", "gap"  # to translate; as it is; white space between sentences
SPAN, BLOCK = "\ufffc", "\ufffb"          # in a flat text: a span in a line; one of several lines

RAW = "script|style|pre|code|samp|kbd|textarea|svg|math"   # elements whose content is no prose
# Symbols that are pictures: arrows, clocks, boxes, stars, dingbats, emoji, flags, skin tones.
PICTURE = (r"\u2190-\u21FF\u2300-\u23FF\u2460-\u24FF\u2500-\u27BF\u2900-\u297F\u2B00-\u2BFF"
           r"\U0001F000-\U0001FAFF")
LETTERLIKE = "©®‼⁉™ℹ〰〽㊗㊙"   # pictures only with U+FE0F behind them
JOINED = "\uFE0E\uFE0F\u200D\u20E3\U000E0020-\U000E007F"   # what follows a picture and belongs to it
MONEY = r"\d[\d.,]*[A-Za-z]{0,2}\s+[A-Za-z]{2}"              # behind a $: an amount and a word
SUFFIX = ("com|org|net|edu|gov|io|py|js|ts|java|cpp|html|css|json|ya?ml|xml|csv|txt|md|sh|sql|pdf|jpe?g"
          "|png|zip|exe")
URL_STOP = r"\s<>()\[\]|\\\"`“”‘’«»、。，；：！？（）「」『』【】《》"

# What begins a span. A named one lasts until a place that `span_end` looks up; the others are whole.
OPENER = re.compile(rf"""
    (?P<fence> ^[ \t>]*(?:(?:[-*+]|\d{{1,9}}[.)])[ \t]+)? (?P<mark> `{{3,}}(?=[^`\n]*$) | ~{{3,}}) [^\n]*)
  | (?P<ticks> `+)
  | (?P<formula> \$\$ | \\[\[(])
  | (?P<other> <!-- | <!\[CDATA\[ | <\?(?:php|xml|=))
  | (?P<named> \\begin\{{(?P<environment>\w+\*?)\}} | <(?P<tag>(?i:{RAW}))(?:\s[^<>]*)?>)
  | [{SPAN}{BLOCK}]
  | <[A-Za-z][\w:-]*(?:\s+[\w:@.-]+\s*=\s*(?:"[^"]*"|'[^']*'))+\s*/?>    # a tag, perhaps on several lines
  | <[A-Za-z/!|%][^<>\n]*>                                               # any other, and <placeholders>
  | &(?:\#\d{{1,7}}|\#[xX][\da-fA-F]{{1,6}}|[A-Za-z][A-Za-z\d]{{1,31}});
  | (?<![A-Za-z0-9$\\])\$(?![\s$]|{MONEY})[^$\\\n]*(?:\\.[^$\\\n]*)*(?<!\s)\$(?![\d$])
  | (?<![A-Za-z0-9])(?i:https?://|ftp://|mailto:|www\.)
    [^{URL_STOP}]*(?:\([^\s<>()]*\)[^{URL_STOP}]*)*(?<![.,;:!?'*])        # no stop at its end, ( ) in pairs
  | !?\[(?=[^\[\]\n]{{1,199}}\]\([^\s)])                               # the first half of [text](url "title")
  | \]\((?:[^()\s]|\([^()\s]*\))+(?:[ \t]+"[^"\n]*")?\)               # and the second one
  | \]\[[^\[\]\n]{{0,99}}\]                                              # and of [text][label]
  | ^[ ]{{0,3}}\[[^\[\]\n]{{1,99}}\]:(?=[ \t]+<?[\w.:-]{{0,99}}[/\#])        # [label]: url
  | \[\^[^\[\]\s]{{1,99}}\]:?                                            # footnotes[^1]
  | (?<![A-Za-z0-9])[A-Za-z]:\\(?![\s\\])[^\s<>:"|?*`“”‘’,;，。；、]*(?<![.!)])     # a path on Windows
  | (?<![A-Za-z0-9_.+-])[A-Za-z0-9_.+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+
  | \{{\{{[^{{}}\n]*\}}\}} | \{{%[^{{}}\n]*%\}} | \$?\{{[\w.-]*(?:[ ][\w.-]+){{0,2}}\}}
  | [\[［【]\s*\d{{1,6}}\s*[\]］】] | %[sd]\b | \\\|
  | (?<![\w.&/])[@\#][A-Za-z_]\w+ | _{{3,}}                              # @handles, #tags, blanks to fill in
  | (?<![\w.-])(?:[\w-]{{1,63}}\.){{1,9}}(?:{SUFFIX})(?![\w.-]*\w)         # example.com, notes.txt
  | (?<![A-Za-z0-9_])[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+(?:\(\))?(?!\w)         # snake_case
  | (?<!\w)[A-Za-z][\w.]*\(\)                                             # calls()
  | (?:[0-9\#*]\uFE0F?\u20E3|[{LETTERLIKE}]\uFE0F|[{PICTURE}][{JOINED}]*)+
""", re.VERBOSE | re.MULTILINE)
# What may end one.
CLOSER = re.compile(rf"\n|`+|\$\$|\\[\])]|-->|\]\]>|\?>|\\end\{{(\w+\*?)\}}|</({RAW})\s*>", re.IGNORECASE)
INFO = re.compile(r"[\w+#.-]*[ \t\r]*(?:\n|$)")     # behind the ticks of a fence: the language
BLANK_LINE = re.compile(r"\n[ \t]*(?=\r?\n)")
PARAGRAPH = re.compile(r"(?:^[^\S\n]*\S.*\n?)+", re.MULTILINE)     # lines that are not blank
CLOSED_BY = {"$$": "$$", "\\[": "\\]", "\\(": "\\)", "<!--": "-->", "<![CDATA[": "]]>"}

# What code without a fence begins with: an assignment, an import, SQL, an entry of JSON; words of languages.
CODE_START = re.compile(r"""
    [A-Za-z_][\w.]*(?:\[[^]]*])?\s*(?:[-+*/%|&]?=|:=|<-)\s*\S
  | "[^"]*"\s*:\s*(?:["\[{\d-]|(?:true|false|null)\b)
  | import\s+[\w.]+(?:\s+as\s+\w+)?;?$ | from\s+[\w.]+\s+import\b | \#include\b | return(?:\s+\S+)?;?$
  | (?:SELECT|INSERT\ INTO|UPDATE|DELETE\ FROM|CREATE\ TABLE|FROM|WHERE|ORDER\ BY|GROUP\ BY|SET|VALUES|LIMIT
      |(?:(?:LEFT|RIGHT|INNER)\ )?JOIN)\b
  | (?:else|try|finally|do)\s*[:{]?$""", re.VERBOSE)
CODE_HEADS = set("def class for while if elif with switch catch except function fn func public private "
                 "protected static void const let var int float double string String bool char auto using "
                 "package export return print echo puts".split())
CALL, COMMENT = re.compile(r"[A-Za-z_][\w.]*\("), re.compile(r"\s*(?:#|//|--|/\*|\*/)")
MOSTLY_CODE = 0.7

# All that Unicode has for the end of a line, none of which a translator gives back.
LINE_END = re.compile(rf"(\r?\n|[\r\v\f\x85\u2028\u2029]|{BLOCK})")
HIDDEN = re.compile(rf"[{SPAN}{BLOCK}]")
QUOTE = " \t\r>"
WORD, LETTER_OR_DIGIT = re.compile(r"[^\W\d_]"), re.compile(rf"[\w{SPAN}]")
SOME_WORD = re.compile(r"[^\W\d_]{2}|[^\W\d_A-Za-z]")          # not "B" alone, nor "f(x) = 2x"
CELL_END, TAB = re.compile(r"([|\t])"), re.compile(r"(\t)")
TABLE_RULE = re.compile(r"[ \t>]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t\r]*")
# Kept at the start of a line: indentation, quote marks, headings, list markers, check boxes, numbers.
MARKER = re.compile(r"\s*(?:>\s*|(?:[-*+•·‣–]|#{1,6}|\(?(?:\d{1,3}[.):]|[A-Za-z][.)]|[IVX]{1,5}[.)])"
                    r"|\[[ xX]\])(?:\s+|$)|\d{1,3}、\s*|（\d{1,3}）\s*)*")
# A run of stops is tried at its first one alone; the last stops need no space after them.
SENTENCE_END = re.compile(r"(?:(?<![.!?…؟।۔።])[.!?…؟।۔።]+[\"'”’»)\]*_]*(?=\s)"
                          r"|[。！？။។](?![。！？။។])[”’」』）]*)\s*(?=\S)")
FIRST_LETTER = re.compile(r"[\"'“‘(\[*_¿¡]*(\S)")
NOT_AN_END = set("Mr Mrs Ms Dr Prof St vs etc cf al No Fig Jr Sr Inc Ltd Co approx Vol pp "
                 "Gen Sen Gov Rep Lt Col Capt Sgt Rev Hon Mt Sec Eq Ch Art Tel Ave".split())
INITIALS = re.compile(r"(?:[A-Za-z]\.)*[A-Z]|(?:[A-Za-z]\.)+[a-z]|\d{1,2}")     # J, U.S, e.g, 3 in 3. Oktober
LONGEST_ABBREVIATION = 12   # characters, with what may stand before one
CLAUSE_END, SPACE = re.compile(r"[;:,]\s+|[，、；：]\s*"), re.compile(r"\s")
EDGES = (string.whitespace + string.punctuation
         + "\u00a0\u3000«»‘’‚‛“”„‟…、。〈〉《》「」『』【】〔〕！（），．：；？")
MARK = re.compile(r"[\[［【]\s*(\d{1,6})\s*[\]］】]")

Piece = tuple[str, str]       # kind, text
Fits = Callable[[str], bool]  # is a segment short enough? Its spans are marks


# ---- spans ----

def find_closers(text: str) -> dict[str, list[int]]:
    """Where what may end a span ends itself, by its name: "\n", "``", "code", "pmatrix", a blank line, ..."""
    closers = defaultdict(list)
    for match in CLOSER.finditer(text):
        closers[match[1] or (match[2] or match[0]).lower()].append(match.end())
    closers["blank line"] = [match.end() for match in BLANK_LINE.finditer(text)]
    return closers


def closing(places: list[int], start: int) -> float:
    """The first of the places behind `start`."""
    i = bisect_right(places, start)
    return places[i] if i < len(places) else inf


def fence_end(opener: re.Match) -> int:
    """The end of the line that closes a fence: a fence of the same character, at least as long. One in a
    quote ends with the quote."""
    mark = opener["mark"]
    closers = rf"^[ \t>]*{mark[0]}{{{len(mark)},}}[ \t\r]*$"
    if opener[0].lstrip().startswith(">"):
        closers += r"|\n(?![ \t]*>)"
    found = re.compile(closers, re.MULTILINE).search(opener.string, opener.end())
    return found.end() if found else len(opener.string)


def span_end(match: re.Match, closers: dict[str, list[int]]) -> int | None:
    """Where the span ends that this opener begins; None if it begins none."""
    kind, opener, text, start = match.lastgroup, match[0], match.string, match.end()
    if kind is None:
        return start
    if kind == "fence":
        return fence_end(match)
    key, limit, unclosed = CLOSED_BY.get(opener, "?>"), "the end", len(text)
    if kind == "formula":
        limit, unclosed = "blank line", None
    elif kind == "ticks":
        key = opener
        if len(opener) < 3:
            limit, unclosed = "\n", None
        elif not INFO.match(text, start):
            unclosed = None                         # "use ``` to begin code" begins none
    elif kind == "named":
        key = match["environment"] or match["tag"].lower()
        if match["environment"] or not text.startswith(("\n", "\r\n"), start):
            unclosed = start                        # "the <pre> tag" is a word in a sentence

    end = closing(closers[key], start)
    return end if end < closing(closers[limit], start) else unclosed


def united(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that touch or overlap are one."""
    found = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def is_code(line: str) -> bool:
    """Whether a line looks like a statement, a part of one, or an entry of JSON."""
    line = line.strip()
    if line.endswith(">") or '">' in line:  # of a tag
        return False
    if CODE_START.match(line) or not line.strip("{}()[];,"):
        return True
    symbols = set("=()[]{}+*/<>%") & set(line)
    if line.endswith((";", "{")) or line.startswith("}"):
        return bool(symbols)
    if CALL.match(line):
        return line.endswith((")", "):"))
    head = line.split(maxsplit=1)[0]
    return head in CODE_HEADS and (bool(symbols) or line.endswith(":"))


def is_object(line: str) -> bool:
    """Whether a line is an object of JSON, whole."""
    if line.strip()[:1] == "{":
        with contextlib.suppress(ValueError, RecursionError):
            return bool(json.loads(line))
    return False


def code_lines(lines: list[str]) -> tuple[int, int] | None:
    """From which to which line a paragraph is code, where two lines at least look like code, and most between
    the first and the last one do or are comments; a line that is_object counts as two."""
    code = [number for number, line in enumerate(lines) if is_code(line)]
    code += [number for number, line in enumerate(lines) if is_object(line)] * 2
    comments = [number for number, line in enumerate(lines) if COMMENT.match(line)]
    both = {*code, *comments}
    if len(code) < 2 or len(both) < MOSTLY_CODE * (max(both) - min(both) + 1):
        return None
    return min(both), max(both)


def code_blocks(text: str) -> Iterator[tuple[int, int]]:
    """Where the code lies that has no fence: in paragraphs, whose prose above and below stays prose."""
    for paragraph in PARAGRAPH.finditer(text):
        lines = paragraph[0].removesuffix("\n").split("\n")
        if found := code_lines(lines):
            first, last = found
            start = paragraph.start() + len("".join(line + "\n" for line in lines[:first]))
            yield start, start + len("\n".join(lines[first:last + 1]))


def flatten(text: str) -> tuple[str, list[str]]:
    """(flat text, its spans). Neighbours are one span."""
    closers, spans, at = find_closers(text), [*code_blocks(text)], 0
    while match := OPENER.search(text, at):
        end, at = span_end(match, closers), match.end()
        if end is not None:
            spans.append((match.start(), end))
            at = end
    spans = united(spans)
    flat, found, at = [], [], 0
    for start, end in spans:
        found.append(text[start:end])
        flat += text[at:start], BLOCK if "\n" in found[-1] else SPAN
        at = end
    return "".join(flat) + text[at:], found


def marked(flat: str) -> str:
    """With [0], [1], ... for the spans."""
    numbers = itertools.count()
    return HIDDEN.sub(lambda _: f"[{next(numbers)}]", flat)


def split_spans(segment: str) -> list[str]:
    """[text, span, text, ..., text]."""
    flat, spans = flatten(segment)
    parts = HIDDEN.split(flat)
    return [*itertools.chain(*zip(parts, spans)), parts[-1]]


def hide(segment: str) -> tuple[str, list[str]]:
    """The segment with [0], [1], ... for its spans, and the spans. Most models copy such marks."""
    flat, spans = flatten(segment)
    return marked(flat), spans


def split_edges(text: str) -> tuple[str, str, str]:
    """(before, core, after): the spaces and the punctuation at both ends of a text beside a span."""
    core = text.strip(EDGES)
    start = len(text) - len(text.lstrip(EDGES))
    return text[:start], core, text[start + len(core):]


def unhide(text: str, spans: list[str]) -> str | None:
    """Put the spans back; None unless every mark is there exactly once."""
    parts = MARK.split(text) if spans else [text]
    if sorted(map(int, parts[1::2])) != list(range(len(spans))):
        return None
    parts[1::2] = [spans[int(number)] for number in parts[1::2]]
    return "".join(parts)


# ---- tables ----

def cells_of(line: str) -> list[str]:
    """The cells of a line if it is a table's row; the pipes at its ends make none."""
    return line.strip(QUOTE).removeprefix("|").removesuffix("|").split("|")


def boxed(line: str) -> str | None:
    """Whether a line may be a row without a rule nearby: pipes at both ends, several cells, words in all that
    are not empty. "padded" if | all | cells | have spaces around them, "tight" if |none|begins|with one|,
    else None: |x| + |y| and |x| and |y| and Haskell's guards are no rows."""
    inner, filled = line.strip(QUOTE), [cell for cell in cells_of(line) if cell.strip()]
    if inner.count("|") < 3 or not inner[0] == inner[-1] == "|":
        return None
    if not all(map(LETTER_OR_DIGIT.search, filled)):
        return None
    if all(cell[0] == cell[-1] == " " for cell in filled):
        return "padded"
    return None if any(cell[0] == " " for cell in filled) else "tight"


def find_rows(lines: list[str], ends: list[str]) -> set[int]:
    """Which lines are rows of tables, by number; ends[i] stands between two lines."""
    rows, in_table = set(), False
    for i, line in enumerate(lines):
        above = lines[i - 1] if i and ends[i - 1] != BLOCK else ""
        follows = "|" in line and "|" in above
        same = follows and len(cells_of(above)) == len(cells_of(line))
        is_rule = same and TABLE_RULE.fullmatch(line)
        both_tight = same and boxed(above) == boxed(line) == "tight"
        if not in_table and (is_rule or both_tight):
            rows.add(i - 1)
        in_table = follows and (in_table or is_rule)
        if in_table or both_tight or boxed(line) == "padded":
            rows.add(i)
    return rows


# ---- sentences ----

def sentences(text: str) -> Iterator[str]:
    """Each with the white space after it. None ends after an abbreviation, an initial or the number of an
    item, or before a small letter."""
    first = 0
    for match in SENTENCE_END.finditer(text):
        stop = match.end()
        window = text[max(first, match.start() - LONGEST_ABBREVIATION):match.start()]
        word = window.split()[-1].lstrip("\"'“‘([") if window.strip() else ""
        initial = INITIALS.fullmatch(word) and word != "I"
        short = match[0].strip() == "." and (initial or word in NOT_AN_END)
        after = FIRST_LETTER.match(text, stop)
        small = after and after[1].islower()
        if not (short or small):
            yield text[first:stop]
            first = stop
    yield text[first:]


def split_long(sentence: str, fits: Fits) -> list[str]:
    """A sentence, halved at the clause or word end nearest its middle until every part fits."""
    if len(sentence) < 2 or fits(marked(sentence)):
        return [sentence]
    middle = place = len(sentence) // 2
    for pattern, reach in ((SPACE, (len(sentence) - 1) // 2), (CLAUSE_END, middle // 2)):
        ends = [match.end() for match in pattern.finditer(sentence, middle - reach, middle + reach)]
        place = min(ends, key=lambda end: abs(end - middle), default=place)
    return split_long(sentence[:place], fits) + split_long(sentence[place:], fits)


# ---- documents ----

def pieces(flat: str, fits: Fits) -> Iterator[Piece]:
    """Everything in a flat text, in order."""
    parts = LINE_END.split(flat)
    lines, ends = parts[::2], [*parts[1::2], ""]
    rows = find_rows(lines, ends)
    for i, line in enumerate(lines):
        cells = (CELL_END if i in rows else TAB).split(line)
        for cell, end in zip(cells[::2], [*cells[1::2], ""]):
            yield from pieces_of_line(cell, fits)
            yield KEEP, end
        yield KEEP, ends[i]


def pieces_of_line(line: str, fits: Fits) -> Iterator[Piece]:
    """The same of a line or a table's cell: what it begins with, its sentences, the spaces behind them."""
    if not SOME_WORD.search(line):
        yield KEEP, line
        return
    first = MARKER.match(line).end()
    body = line[first:].rstrip()
    yield KEEP, line[:first]
    for sentence in sentences(body):
        for part in split_long(sentence, fits):
            core = part.strip()
            before, _, after = part.partition(core) if core else (part, "", "")
            yield GAP, before
            yield TEXT if SOME_WORD.search(core) else KEEP, core
            yield GAP, after
    yield KEEP, line[first + len(body):]


def parse(text: str, fits: Fits) -> list[Piece]:
    """[(kind, string)], whose strings joined are `text`. fits(segment, with marks for its spans): is it short
    enough?"""
    flat, spans = flatten(text)
    spans = iter(spans)
    return [(kind, HIDDEN.sub(lambda _: next(spans), part)) for kind, part in pieces(flat, fits) if part]


def prose(text: str) -> str:
    """What is left of a text for a reader: no code, links, addresses, formulas, tags, emoji, table rules. A
    space or a line break stands for what is left out."""
    parts = []
    for kind, part in pieces(flatten(text)[0], lambda segment: True):
        if kind == TEXT:
            parts.append(HIDDEN.sub(" ", part))
        elif part:
            parts.append("\n" if "\n" in part or BLOCK in part else " ")
    return "".join(parts)
