"""Lesson 6, solved."""

import json
import re


def banned(words, n):
    """The text ends in n - 1 words. Wherever these came before, the word that followed is banned. A text of
    fewer than n words has no place to look at."""
    ending = words[len(words) - n + 1:]
    places = range(len(words) - n + 1)
    return {words[i + n - 1] for i in places if words[i:i + n - 1] == ending}


def put_back(text, spans):
    """Split at the marks first, then put in: after a replacement, a span's own [0] would be taken for a
    mark. With a group in the pattern, split gives text and numbers by turns."""
    parts = re.split(r"\[(\d+)\]", text)
    numbers = [int(number) for number in parts[1::2]]
    if sorted(numbers) != list(range(len(spans))):
        return None
    parts[1::2] = [spans[number] for number in numbers]
    return "".join(parts)


def complete(path, rows, translate):
    """A line is whole if its line break is there. Cut the rest away before anything is appended: else the
    next line would go on in the middle of a broken one."""
    old = path.read_bytes() if path.exists() else b""
    whole = old[:old.rfind(b"\n") + 1]
    if whole != old:
        path.write_bytes(whole)
    records = [json.loads(line) for line in whole.splitlines()]
    done = {record["source"]: record["text"] for record in records}
    for row in rows:
        if row not in done:
            done[row] = translate(row)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"source": row, "text": done[row]}) + "\n")
    return [done[row] for row in rows]
