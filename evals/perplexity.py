"""NLL of held-out responses per UTF-8 byte, which models with other tokenizers can be compared with."""

import math
from dataclasses import replace
from pathlib import Path

import data
from engine.files import InputError
from evals import choice
from evals.figures import MEAN, Sample, ratio

NATS = replace(MEAN, digits=4)                 # of counts (nats, bytes)
BITS = replace(NATS, of_sums=lambda sums: ratio(sums) / math.log(2))


def scored_rows(path: Path, source: str, target: str, split: str) -> list[dict]:
    """The rows of a file in both languages, and of a split or of none; how many are of others is said."""
    found = data.evaluation_rows(path, source, [target], trained=())
    rows = [row for row in found if not split or (row.get("split") or split) == split]
    if not rows:
        raise InputError(f"{path} has no row of split {split!r}: see --split")
    if len(rows) < len(found):
        print(f"{len(found) - len(rows)} rows of other splits than {split} are left out")
    return rows


def forks_and_lines(tokenizer, rows: list[dict], place: str, language: str, system_prompt: str | None,
                    longest: int) -> tuple[list[data.Fork], list[dict]]:
    """The rows' responses in a language, to be scored, and the line of each, which lacks its NLL. InputError
    for a response of more tokens than `longest`."""
    forks, lines = [], []
    for row in rows:
        name, texts = row["row_id"], row[language]
        prompt = tokenizer.prompt_ids(texts["prompt"], system_prompt)
        reply = tokenizer.response_ids(texts["response"])
        fork, = choice.fitting_forks(f"row {name} in {language}", prompt, [reply], longest)
        forks.append(fork)
        lines.append({
            "question": name,
            "place": place,
            "cut": len(fork.prompt) < len(prompt),
            "bytes": len(texts["response"].encode()),
            "tokens": len(reply)})
    return forks, lines


def response_lines(model, tokenizer, rows: list[dict], places: dict[str, str], done: set,
                   system_prompt: str | None, batch_tokens: int):
    """Yields a line with the NLL of each row's response in the languages of `places`, but for those that are
    done: (place, row_id). A response that is too long is refused before any is scored."""
    longest = model.config.max_position_embeddings
    todo = []
    for place, language in places.items():
        known = {i for i, row in enumerate(rows) if (place, row["row_id"]) in done}
        todo.append((known, *forks_and_lines(tokenizer, rows, place, language, system_prompt, longest)))
    for known, forks, lines in todo:
        for i, (logp,) in choice.fork_logps(model, forks, batch_tokens, known):
            yield lines[i] | {"nll": -logp}


def byte_figures(place: str, lines: list[dict]) -> dict[str, dict]:
    """Bits, nats and their exponential per byte of one language's responses."""
    counts = {line["question"]: (line["nll"], line["bytes"]) for line in lines}
    nats, bits = (Sample(figure, counts).summary() for figure in (NATS, BITS))
    perplexity = nats | {
        "value": math.exp(nats["value"]),
        "stderr": None}
    return {
        f"bits/byte {place}": bits,
        f"nll/byte {place}": nats,
        f"perplexity/byte {place}": perplexity}
