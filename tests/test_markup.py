"""formats/markup.py: what is prose and what is not, whole and in linear time."""

import itertools
import random
import time

import pytest

from formats.markup import KEEP, SOME_WORD, TEXT, hide, parse, prose, split_edges, split_spans, unhide
from formats.records import read_rows


def always(segment):
    return True


def texts(document):
    """What a translator would see, spans and all."""
    return [string for kind, string in parse(document, always) if kind == TEXT]


def spans(segment):
    return split_spans(segment)[1::2]


# ---- spans ----

@pytest.mark.parametrize("text, found", [
    (r"$P(A|B) = \frac{P(B|A)P(A)}{P(B)}$ is Bayes' rule", [r"$P(A|B) = \frac{P(B|A)P(A)}{P(B)}$"]),
    (r"so $\$5 + x$ and \(a | b\) and \[c\] and $$d$$", [r"$\$5 + x$", r"\(a | b\)", r"\[c\]", "$$d$$"]),
    ("面积是$x^2$的", ["$x^2$"]),
    ("the $n$th one", ["$n$"]),
    (r"\begin{pmatrix*}1\end{pmatrix*}!", [r"\begin{pmatrix*}1\end{pmatrix*}"]),
    ("It costs $5 and $10, or 5$ in all. US$ and CA$ too", []),
    ("from $HOME to $PATH", []),
    (r"\$5 and \$6", []),
    ("run `cat a | grep b | wc` now", ["`cat a | grep b | wc`"]),
    ("``a ` b`` and `` ` ``", ["``a ` b``", "`` ` ``"]),
    ("a lone ` tick", []),
    ("a\n`b\nc` d", []),
    ("text: ```python\nx = 1\n``` more", ["```python\nx = 1\n```"]),
    ("See [the page](https://a.example/x_(y)?z=1 \"A title\").",
     ["[", '](https://a.example/x_(y)?z=1 "A title")']),
    ("![a picture](a.png) and [a](b)", ["![", "](a.png)", "[", "](b)"]), ("[see this] (or that)", []),
    ("@ada says #hello at example.com: see notes.txt, docker-compose.yml, No.5 and e.g.com",
     ["@ada", "#hello", "example.com", "notes.txt", "docker-compose.yml", "e.g.com"]),
    ("call max_num, getName() and np.mean() or _this_; fill in ____ a_", ["max_num", "getName()", "np.mean()", "____"]),
    ("Use ``` to begin code. More", []), ("{a few words} and {a sentence of five words}", ["{a few words}"]),
    ("at https://en.wikipedia.org/wiki/Foo_(bar), and (www.a.example).",
     ["https://en.wikipedia.org/wiki/Foo_(bar)", "www.a.example"]),
    ("请看https://a.example/x。然后请联系a.b@c.example谢谢", ["https://a.example/x", "a.b@c.example"]),
    ("mail me@a-b.example.com.", ["me@a-b.example.com"]), ("a@b is none, nor x@ y", []),
    ("1️⃣ ⭐ ⏰ ▶ → ▶️ #️⃣", ["1️⃣", "⭐", "⏰", "▶", "→", "▶️", "#️⃣"]),
    ("🇩🇪🇰🇪 👍🏽 👨‍👩‍👧 ❤️‍🔥 🏴󠁧󠁢󠁥󠁮󠁧󠁿", ["🇩🇪🇰🇪", "👍🏽", "👨‍👩‍👧", "❤️‍🔥", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"]),
    ("©️ and © ✅ ☎️ ㊗️ ├── src", ["©️", "✅", "☎️", "㊗️", "├──"]),
    ("<![CDATA[ a < b\n]]> and <%= name %>", ["<![CDATA[ a < b\n]]>", "<%= name %>"]),
    ('{{ user["name"] | upper }} {% if a %} ${HOME}',
     ['{{ user["name"] | upper }}', "{% if a %}", "${HOME}"]),
    ("It costs $3bn to the US$ holder", []), ("$2x + 3$ and $5 \\bmod 3$", ["$2x + 3$", "$5 \\bmod 3$"]),
    ("क्‍षत्रिय and می‌خواهم", []), ("12 * 3 # 4", []),
    ("a &lt;b&gt; &#39;c&#x27; d&nbsp;e, AT&T; R&D", ["&lt;", "&gt;", "&#39;", "&#x27;", "&nbsp;"]),
    ("x < y and y > z, a<b", []),
    ("I <3 you > all", []),
    ("<br><br/> <YOUR_KEY> <!DOCTYPE html>", ["<br><br/>", "<YOUR_KEY>", "<!DOCTYPE html>"]),
    ('<img\n  alt="a > b"\n  src="x">!', ['<img\n  alt="a > b"\n  src="x">']),
    ("the <code> tag", ["<code>"]), ("so <CODE class=a>x y</code> is code", ["<CODE class=a>x y</code>"]),
    ("<script async>\nlet word = 1;\n</script> and <style>p {color: red}</style>",
     ["<script async>\nlet word = 1;\n</script>", "<style>p {color: red}</style>"]),
    ("<pre>\nnever closed", ["<pre>\nnever closed"]), ("the <pre> tag is a word", ["<pre>"]),
    ("<!-- a\n\nb --> c <!-- d", ["<!-- a\n\nb -->", "<!-- d"]),
    ("<?php echo 'the words';", ["<?php echo 'the words';"]),
    ("Hello {name}, {{ user.name }}, %s, [1] and [12]", ["{name}", "{{ user.name }}", "%s", "[1]", "[12]"]),
    ("见【1】、［ 2 ］和 [ 3 ]", ["【1】", "［ 2 ］", "[ 3 ]"]),           # would pass for the marks of spans
    ("$$\n\nis slang, so is $$", []), ("\\[\nx\n\\] y", ["\\[\nx\n\\]"]),
    ("[The guide][guide] says[^1] [so][].\n\n[guide]: /x\n[^1]: Indeed.\n[Note]: is a word, [a] too",
     ["][guide]", "[^1]", "][]", "[guide]:", "[^1]:"]),
    ("Open C:\\Users\\王\\a.txt, or 在D:\\数据。然后 (e:\\x). is:\\nnext, c:\\ x",
     ["C:\\Users\\王\\a.txt", "D:\\数据", "e:\\x"]),
])
def test_spans_are_found_whole(text, found):
    assert spans(text) == found


@pytest.mark.parametrize("text, after", [
    ("```\na\n```\nafter", "after"), ("````\n```\nin\n```\nin\n````\nafter", "after"),
    ("~~~~ md\n~~~\n```\n~~~~~  \nafter", "after"), ("```\nin\n~~~\n``` no\n```\nafter", "after"),
    ("> ```sh\n> in\n> ```\nafter", "after"), ("> ```\n> in\n\nafter", "after"),
    ("1. ```\n   in\n   ```\n2. after", "after"),
    ("```r\r\nin\r\n```\r\nafter", "after"), ("   ```\n   in\n   ```\nafter", "after"),
    ("```\nnever closed\n", None), ("~~~\nin\n```\n", None), ("`````\nin\n````\nin", None),
])
def test_a_fence_ends_at_one_of_its_kind_that_is_as_long(text, after):
    assert texts(text) == ([after] if after else [])


def test_spans_hide_behind_marks_and_come_back():
    segment = "use `ls` on https://a.example/x, [1] times"
    hidden, found = hide(segment)
    assert hidden == "use [0] on [1], [2] times" and found == ["`ls`", "https://a.example/x", "[1]"]
    assert unhide("mara [2] kwa ［1］ tumia 【 0 】", found) == "mara [1] kwa https://a.example/x tumia `ls`"
    assert unhide("use [0] on [1]", found) is None and unhide("[0] [0] [1] [2]", found) is None
    assert unhide("[7] is text", []) == "[7] is text"
    assert split_edges(" (the page, ") == (" (", "the page", ", ") and split_edges(" . ") == (" . ", "", "")


CODE = """def add(a, b):
    # the sum
    return a + b"""


@pytest.mark.parametrize("code", [
    '{"text": "How are you? Fine."}', '{"a b": [1]}\n{"c d": {}}\r',
    CODE, "SELECT name\nFROM users\nWHERE id = 1;", 'x = 2\nprint(x)', '{\n  "name": "Ada",\n  "age": 36\n}',
    "if (a) {\n  go();\n} else {\n  stop();\n}", "import os\nfrom a import b", "int x = 1;\nfor (i = 0; i < 2; i++) {\n}"])
def test_code_without_a_fence_is_kept_and_prose_around_it_is_not(code):
    assert texts(f"Write it like this:\n{code}\nThat is all.") == ["Write it like this:", "That is all."]
    assert texts(code) == [] and spans(f"First.\n\n{code}\n\nLast.") == [code]


@pytest.mark.parametrize("text", [
    '{"the lion', '{"the": "lion"} is JSON',
    "If you want to know more:\nask for it (or read on);\nthen go home", "Buy these:\napples;\npears;\nplums.",
    "Roses are red,\nviolets are blue;\nsugar is sweet,\nand so are you.", "Dear Ms Lee,\nThank you (very much)!\nYours,\nAda",
    '"Abate": to become less\n"Benign": kind', "Price = what you pay\nis what they say", "# Title\n# Another", "From Nairobi\nto Mombasa", "x = 2"])
def test_prose_is_no_code(text):
    assert spans(text) == []


# ---- tables ----

@pytest.mark.parametrize("line", [
    "|x| is never negative", "a || b, and so on", "||x|| <= |a| + |b|", "|a + b| ≤ |a| + |b|", "|a| and |b|",
    "the state |0⟩ + |1⟩", "| x > 0 = one", "| otherwise = zero", "cat file | sort | uniq -c",
    "| x | + | y |", "string | number | null", "expr ::= term | factor | <x>", "(foo|bar|baz)",
    "|x|·|y| = |xy|",
    "P(A|B) and P(B|A)", "either | or", "f :: a -> b | c -> d", "{ x | x in A | x > 0 }"])
def test_a_line_with_pipes_is_no_table(line):
    kept = [line] if SOME_WORD.search(line) else []
    assert texts(line) == kept
    assert texts(f"first\n{line}\nlast") == ["first", *kept, "last"]


@pytest.mark.parametrize("table, cells", [
    ("| Name | The value |\n|:---|---:|\n| the lion | big |", ["Name", "The value", "the lion", "big"]),
    ("Name | The value\n--- | :-:\nthe lion | big\n\na | b",
     ["Name", "The value", "the lion", "big"]),
    ("| a \\| b | c |\n|---|---|\n| `x|y` is | $P(A|B)$ |", ["`x|y` is"]),
    ("> | one | two |\n> |---|---|\n> |three|four|", ["one", "two", "three", "four"]),
    ("before\n| one |\n|---|\n| two |\nafter", ["before", "one", "two", "after"]),
    ("| one | two |\n|---|---|\n|| three |\r\nafter", ["one", "two", "three", "after"]),
    ("| the lion | is big |", ["the lion", "is big"]),
    ("|one|two|\n|three|four|\n|five||\n\n|six|seven|",
     ["one", "two", "three", "four", "five", "|six|seven|"]),
    ("|Name |Value |\n|lion |big |", ["Name", "Value", "lion", "big"]),
    ("one | two\n---\nthree | four", ["one | two", "three | four"]),
    ("one\n---|---\nthree | four", ["one", "three | four"]),
])
def test_tables_are_split_into_cells(table, cells):
    assert texts(table) == cells
    assert "".join(string for _, string in parse(table, always)) == table


@pytest.mark.parametrize("between", ["\t", "\r", "\r\n", "\v", "\f", "\x85", "\u2028", "\u2029", "\t\t "])
def test_what_a_translator_would_lose_between_texts_cuts_them(between):
    text = f"The lion{between}is a mammal.{between}- It eats{between}"
    assert texts(text) == ["The lion", "is a mammal.", "It eats"]
    assert "".join(string for _, string in parse(text, always)) == text
    assert texts("| the\tlion | big |\n|---|---|") == ["the", "lion", "big"]


# ---- sentences ----

@pytest.mark.parametrize("text, expected", [
    ("One. Two! Three?", ["One.", "Two!", "Three?"]),
    ("By J.R.R. Tolkien of the U.S. Navy at 9 a.m. EST. Then Gen. Lee",
     ["By J.R.R. Tolkien of the U.S. Navy at 9 a.m. EST.", "Then Gen. Lee"]),
    ("Am 3. Oktober 1990. Danach", ["Am 3. Oktober 1990.", "Danach"]),
    ("1. Werewolf 2. Who Am I? 3. Charades", ["Werewolf 2. Who Am I?", "3. Charades"]),
    (">Mine is a lion.", ["Mine is a lion."]), (">>> - a lion\n>one", ["a lion", "one"]),
    ("IV. Four", ["Four"]), ("· one", ["one"]), ("1、一个", ["一个"]), ("（2）两个", ["两个"]),
    ("B", []), ("f(x) = 2x", []), ("是", ["是"]),
    ("Dr. Smith met J. Doe in the U.S. army, e.g. here. Then left.",
     ["Dr. Smith met J. Doe in the U.S. army, e.g. here.", "Then left."]),
    ("It costs 3.5 and is v1.2.3 now", ["It costs 3.5 and is v1.2.3 now"]),
    ('He said "Go." Then "No!" she said.', ['He said "Go."', 'Then "No!" she said.']),
    ("狮子住在哪里？！草原。", ["狮子住在哪里？！", "草原。"]),
    ("see `a. B` now", ["see `a. B` now"]),
    ("آپ کیسے ہیں۔ میں ٹھیک ہوں۔", ["آپ کیسے ہیں۔", "میں ٹھیک ہوں۔"]),
    ("अच्छा। ठीक है।", ["अच्छा।", "ठीक है।"]),
])
def test_sentences_end_where_a_reader_would_end_them(text, expected):
    assert texts(text) == expected


def cut(text, fits):
    parts = [string for _, string in parse(text, fits)]
    assert "".join(parts) == text
    return parts


def test_long_sentences_are_cut_at_clauses_then_words_until_they_fit():
    text = "alpha beta gamma, delta epsilon; zeta eta theta iota " * 4
    parts = cut(text, lambda s: len(s) <= 40)
    assert max(map(len, parts)) <= 40 and set(" ".join(parts).split()) == set(text.split())
    assert max(map(len, cut("狮" * 9, lambda s: len(s) <= 4))) <= 4


def test_no_span_is_cut_and_marks_count_for_their_spans():
    link = "https://a.example/" + "x" * 300
    text = f"the {link} and {link} are two of the pages that are meant here, and {link} is another"
    parts = cut(text, lambda s: len(s) <= 30)
    assert sum(part.count(link) for part in parts) == 3 and len(parts) > 4
    assert [text] == cut(text, lambda s: len(s) <= 200)


# ---- prose ----

def test_prose_is_what_a_reader_reads():
    document = ("# Kichwa\n\nHabari `print(x)` ya [dunia](https://a.example) leo, $x^2$ na me@a.example "
                "&amp; <b>wewe</b>.\n```python\nthe = code\n```\n| jina | thamani |\n|---|---|\n"
                "| simba | 5 |\n<script>the = 1</script>\n")
    assert prose(document).split() == "Kichwa Habari ya dunia leo, na wewe . jina thamani simba".split()
    assert prose("One. Two.\n\nThree") == "One. Two.\n\nThree"
    assert prose("") == "" and not prose("`a` 5").strip()


# ---- nothing is lost, and no text takes long ----

def test_the_parts_of_real_replies_joined_are_the_replies(shared):
    file = shared / "oasst" / "en_100_tree.jsonl.gz"
    for row in read_rows(file, "en", "all"):
        for text in row["en"].values():
            assert "".join(part for _, part in parse(text, lambda s: len(s) < 200)) == text


PIECES = [
    "|", "||", "\\|", "`", "``", "```", "````", "~~~", "\n", "\n\n", "\r\n", " ", "    ", "\t", "$", "$$",
    "\\(", "\\)", "\\[", "\\]", "<", ">", "<pre>", "</pre>", "<script>", "<!--", "-->", "](", ")", "[",
    "[0]", "{", "}", "&amp;", "\\begin{a}", "\\end{a}", "|---|---|", "--- | ---", "- ", "1. ", "> ", "# ",
    "word", "The lion. ", "狮子。", "😀", "1️⃣", "\u200d", "\ufe0f", "a@b.c", "https://a.b/c", "www.", "...",
    "e.g. ", "%s", "\\", "\0", "\u2028",
]


def check_nothing_lost(text):
    for size in (3, 40):
        parts = parse(text, lambda s: len(s) < size)
        assert "".join(string for _, string in parts) == text
        assert all(kind == KEEP or "\n" not in string for kind, string in parts)
    hidden, found = hide(text)
    assert "[" in text or unhide(hidden, found) == text
    assert prose(text).count("\n") <= text.count("\n")


def test_nothing_is_lost_of_random_documents():
    rng = random.Random(0)
    for _ in range(1500):
        check_nothing_lost("".join(rng.choices(PIECES, k=rng.randint(1, 25))))
    for pair in itertools.product(PIECES, repeat=2):
        check_nothing_lost("".join(pair))


@pytest.mark.slow
def test_nothing_is_lost_of_any_text():
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies

    @hypothesis.settings(max_examples=3000, deadline=None)
    @hypothesis.given(some.lists(some.sampled_from(PIECES) | some.text(max_size=5), max_size=30))
    def check(pieces):
        check_nothing_lost("".join(pieces))

    check()


SIZE = 200_000
REPEATED = [
    "a", ".", " ", "`", "$", "<", "[", "(", "*", "{", "\\", "|", "-", "_", "~", "&", "%", "@", "#", "\t",
    "\n", "。", "狮", "😀", "\u200d", "` ", "$a ", "$ a ", "<a", "<a ", "<a b=\"", "<a x=", "](", "](a",
    "](a(", "\\(", "\\[", "(a", "[a", "\\begin{a}", "<pre>", "<pre\n", "<!--", "<!-", "<?php ", "a@",
    "www.", "http://", "{a ", "&a", "| ", "|\n", "|-", "|-|-|\n", "- ", "> ", "1. ", "a. ", "e.g. ", ".\"",
    ".. a", ".)", "a, ", "a ", "a\n", "\r\n", "````\n", "~~~\n", "`a` b. ", "😀 a ", "<code>a</code> b. ",
    "|x| ", "1\ufe0f", "\"", ' ](a "', "狮子。", "The lion, he said. ",
]


def nasty_texts():
    yield from ((part * SIZE)[:SIZE] for part in REPEATED)
    yield "a" + " " * SIZE + "b"
    yield "a" * SIZE + "@"
    yield "." + ")" * SIZE
    yield "(" * (SIZE // 2) + ")" * (SIZE // 2)
    yield "[" * (SIZE // 2) + "]" * (SIZE // 2)
    yield "http://" + "a(" * (SIZE // 2)
    yield "$" + "\\$" * (SIZE // 2)
    yield "<a " + "b " * (SIZE // 2)
    yield "````\n" + "```\n" * (SIZE // 4)
    yield "".join("`" * n + " " for n in range(600))
    yield "".join(f"\\begin{{a{n}}}" for n in range(SIZE // 14))
    yield "| a b | `c|d` |\n|---|---|\n" + "| the lion | is big |\n" * (SIZE // 22)
    yield (" " * 999 + "\n") * (SIZE // 1000)


def check_time(text, most):
    start = time.process_time()
    parts = parse(text, lambda s: len(s) < 300)
    took = time.process_time() - start
    assert "".join(string for _, string in parts) == text
    assert took < most, f"{text[:30]!r}... ({len(text):,} characters): {took:.1f} s"


@pytest.mark.parametrize("text", [
    "a" * 32_000, "." * 40_000, "a" + " " * 100_000 + "b", "$" * 20_000, "<a" * 10_000, "[" * 20_000,
    "(" * 20_000, "*" * 20_000, "` " * 10_000, "e.g. " * 10_000, "a. B " * 10_000])
def test_no_document_takes_long(text):
    """A quadratic step takes minutes where these take parts of a second."""
    check_time(text, 1)


@pytest.mark.slow
def test_no_document_of_any_kind_takes_long():
    for text in nasty_texts():
        check_time(text, 2.5)
