"""A verdict out of a judge's reply: the probabilities of its first token, as in alpaca_eval, or its text."""

import math
import re

VERDICT = "at least half of the first token's probability on m and M, else the letter that the text names"
ENOUGH = 0.5                     # of the first token's probability on the two letters makes it a verdict
LONGEST_MESSAGE = 400            # characters kept of what a server or a judge wrote

# the end of what a model says to itself, in the templates that mark it
REASONING = re.compile(r".*(</[\w:]*(think|thought|reason)\w*>|\[/THINK]|END_THINKING\|>|/think▷"
                       r"|<\|channel\|>final|<channel\|>)", re.S | re.I)
UNFINISHED = re.compile(r"<[\w:]*(think|thought|reason)\w*>|\[THINK]|START_THINKING|◁think▷|<\|?channel",
                        re.I)
PART = "0-9A-Za-z_\u00c0-\u024f\u0300-\u036f\u1e00-\u1eff'’&/-"         # of a word, for a letter beside it
LETTER = rf"(?:(?<![{PART}])(?<!\d )|(?<=answer_))([mM])(?![{PART}])"       # alone, and no unit of measure
LONGER_WORD = re.compile(rf"\W*[mM][{PART}]")          # "Maybe": its first token may well be an M
# in the clause of a letter they may mean the other one
NEGATION = re.compile(r"\b(?:not|never|neither|nor|cannot|worse|worst|weaker|inferior|wrong|incorrect"
                      r"|inaccurate|bad|avoid|anything but|los(?:es?|t)|fail(?:s|ed)?|reject(?:s|ed)?)\b"
                      r"|n['’]t\b", re.I)
BORDER = re.compile(r"[.!?。\n,;:(){}\"–—]|\b(?:because|since|as|which|so|while|(?<!anything )but)\b", re.I)
QUOTED = re.compile(r"(['_])([mM])\1")
# all of a sentence, or announced as the end of one
FINAL = re.compile(rf"(?:^|[.!?:=。：]|\bis)\W*(?i:answer[_ ])?{LETTER}[^\w.!?。\n]*(?=[.!?。]|$)", re.M)


class NoVerdict(Exception):
    """Why a pair has none. kind: for counting; message: what the server or the judge said."""

    def __init__(self, kind: str, message: str, about_one_pair: bool = True):
        super().__init__(kind)
        self.kind, self.about_one_pair, self.message = kind, about_one_pair, message

    def shown(self, secret: str) -> "NoVerdict":
        """With a message of one short line without the secret, which servers may repeat."""
        text = " ".join(self.message.replace(secret, "***").split())
        printable = text.encode(errors="replace").decode()
        return NoVerdict(self.kind, printable[:LONGEST_MESSAGE], self.about_one_pair)


def read_verdict(reply) -> tuple[float, str]:
    """(preference, how it was read) of a chat completion: 2 - P(m) / (P(m) + P(M)) where enough of the first
    token's probability is on the two letters, else by the letter that the text names. Raises NoVerdict."""
    try:
        choice, mass = reply.choices[0], letter_mass(reply.choices[0].logprobs)
        text, refusal = message_text(choice.message.content), choice.message.refusal
    except (AttributeError, IndexError, KeyError, TypeError):
        raise NoVerdict("no chat completion", str(getattr(reply, "error", None) or reply)) from None
    if refusal or choice.finish_reason == "content_filter":
        raise NoVerdict("refusal", str(refusal or text))
    if mass and sum(mass.values()) >= ENOUGH and not LONGER_WORD.match(text):
        return 2 - mass["m"] / sum(mass.values()), "probabilities"
    finished = choice.finish_reason != "length" or not mass and re.fullmatch(rf"\W*{LETTER}\W*", text)
    letter = named_letter(text) if finished else None
    if not letter:
        end = text[-LONGEST_MESSAGE:] or "an empty reply"
        raise NoVerdict("no verdict in the reply" if finished else "reply cut", end)
    return (1.0 if letter == "m" else 2.0), "text"


def message_text(content) -> str:
    """What the judge said. Some servers send parts, some of them thoughts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content if isinstance(content, str) else ""


def letter_mass(logprobs) -> dict[str, float] | None:
    """Probabilities of m and M as the first token, spaces around it aside; None where a server gives none."""
    if not (logprobs and logprobs.content):
        return None
    first = logprobs.content[0]
    tokens = [first, *(first.top_logprobs or [])]
    likely = {token.token: token.logprob for token in tokens}
    mass = {"m": 0.0, "M": 0.0}
    for token, logp in likely.items():
        if token.strip() in mass and logp is not None:
            mass[token.strip()] += math.exp(min(logp, 0.0))
    return mass


def named_letter(text: str) -> str | None:
    """The m or M that stands alone behind the reasoning. Where both do, the last that is announced
    ("Answer: M") or a sentence of its own; None where there is none ("M is as good as m"), or where its
    clause may mean the other one ("M is worse")."""
    text = QUOTED.sub(r"\2", REASONING.sub("", text))
    if UNFINISHED.search(text):
        return None
    letters = [*re.finditer(LETTER, text)]
    if len({letter[1] for letter in letters}) > 1:
        letters = [*FINAL.finditer(text)]
    if not letters or NEGATION.search(clause_at(text, letters[-1].start(1))):
        return None
    return letters[-1][1]


def clause_at(text: str, place: int) -> str:
    """The clause that holds this place."""
    before = BORDER.split(text[:place])[-1]
    behind = BORDER.split(text[place:])[0]
    return before + behind
