"""AlpacaEval's files of answers and the arithmetic of its win rates, of whoever judged.

Its length-controlled rate is left out on purpose: its coefficients were fitted on the English instructions,
and mean lengths are reported instead.

References: AlpacaEval (Dubois et al., arXiv 2404.04475; github.com/tatsu-lab/alpaca_eval,
docs of the outputs format).
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from engine.files import InputError, Journal, as_kind, fingerprint, need, read_json, read_records
from engine.progress import progress
from evals.verdict import NoVerdict
from formats.records import describe_counts


def read_outputs(path) -> dict[str, dict]:
    """{instruction: record} of a file in alpaca_eval's format;
    InputError for a missing text or a repeated instruction."""
    outputs, places = {}, {}
    for where, record in read_records(path):
        instruction, output = (as_kind(need(record, key, where), str, f"{where}: {key}")
                               for key in ("instruction", "output"))
        if instruction in outputs:
            raise InputError(f"{where}: the same instruction as in {places[instruction]}: "
                            f"{instruction[:60]!r}")
        outputs[instruction], places[instruction] = record | {"output": output}, where
    if not outputs:
        raise InputError(f"{path}: the file holds no answers")
    return outputs


def pair_outputs(model_path, reference_path) -> list[dict]:
    """Records with both answers, joined on the exact instruction;
    output_1 is the reference's, as alpaca_eval has it."""
    model, reference = read_outputs(model_path), read_outputs(reference_path)
    pairs = []
    for instruction in [instruction for instruction in model if instruction in reference]:
        first, second = reference[instruction], model[instruction]
        pairs.append({"instruction": instruction, "dataset": second.get("dataset"),
                      "output_1": first["output"], "generator_1": first.get("generator", str(reference_path)),
                      "output_2": second["output"], "generator_2": second.get("generator", str(model_path))})
    if not pairs:
        raise InputError(f"{model_path} and {reference_path} share no instruction: they must be equal "
                        f"byte for byte (eval.py alpaca keeps a translation and gives it to every system)")
    if len(pairs) < max(len(model), len(reference)):
        print(f"{len(pairs)} instructions are in both files; {len(model) - len(pairs)} only in {model_path}, "
              f"{len(reference) - len(pairs)} only in {reference_path}")
    return pairs


def win_rate(annotations: list[dict]) -> dict:
    """alpaca_eval's figures, in %, of the second system: a preference of 2 is a win, 1 a loss, 1.5 a draw
    (0 in old files). Pairs without a preference are left out. Mean lengths in characters."""
    kept = [line for line in annotations
            if isinstance(line.get("preference"), (int, float)) and math.isfinite(line["preference"])]
    wins = [0.5 if line["preference"] == 0 else line["preference"] - 1 for line in kept]
    if not wins:
        raise InputError("no pair has a preference: nothing to average")
    n, mean = len(wins), float(np.mean(wins))
    error = 100 * float(np.std(wins, ddof=1)) / math.sqrt(n) if n > 1 else None
    won, lost = sum(win > 0.5 for win in wins), sum(win < 0.5 for win in wins)
    return {"win_rate": 100 * mean, "standard_error": error, "n_total": n, "n_wins": won,
            "n_wins_base": lost, "n_draws": n - won - lost,
            "discrete_win_rate": 100 * (won + (n - won - lost) / 2) / n,
            "avg_length": round(sum(len(line["output_2"]) for line in kept) / n),
            "avg_length_base": round(sum(len(line["output_1"]) for line in kept) / n),
            "no_preference": len(annotations) - n}


def read_annotations(path) -> list[dict]:
    """The annotations of a file in alpaca_eval's format. InputError for a text or preference that is none."""
    annotations = read_records(path)
    for where, line in annotations:
        check_preference(need(line, "preference", where), where)
        for key in ("output_1", "output_2"):
            as_kind(need(line, key, where), str, f"{where}: {key}")
    return [line for _, line in annotations]


def check_preference(value, where: str) -> None:
    """InputError unless it is from 1 to 2, the 0 of old files, or missing (null, NaN)."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value == 0 or 1 <= value <= 2):
        raise InputError(f"{where}: the preference is {value!r:.80}, from 1 (output_1 wins) to 2 is wanted")


def describe_rate(rate: dict) -> str:
    error = "" if rate["standard_error"] is None else f" ± {rate['standard_error']:.2f}"
    pairs = rate["n_total"] + rate["no_preference"]
    number = f"n = {rate['n_total']}"
    if rate["no_preference"]:
        number += f" of {pairs} pairs, {rate['no_preference']} without a verdict"
    return (f"win rate {rate['win_rate']:.2f}{error} % ({number}: {rate['n_wins']} won, "
            f"{rate['n_wins_base']} lost, {rate['n_draws']} drawn; "
            f"discrete {rate['discrete_win_rate']:.2f} %); "
            f"mean lengths {rate['avg_length']} against {rate['avg_length_base']} characters")


# ---------------------------------------------------------------------------------------------------- judging

def answer_settings(outputs: str, reference: str) -> dict:
    """What made the answers, from the result.json beside them if there is one, and their hashes."""
    beside = Path(outputs).with_name("result.json")
    settings = need(read_json(beside), "settings", beside) if beside.is_file() else {"model": outputs}
    return settings | {"outputs hash": fingerprint(Path(outputs)), "reference": reference,
                       "reference hash": fingerprint(Path(reference))}


def left_to_judge(pairs: list[dict], done: list[dict]) -> tuple[list[dict], bool]:
    """The pairs without a verdict yet, and whether the judge gave any before."""
    names = {line["question"] for line in done}
    asked = any(line["reading"] != "equal answers" for line in done)
    return [pair for pair in pairs if pair["instruction"] not in names], asked


def annotation_records(pairs: list[dict], done: list[dict], annotator: str) -> list[dict]:
    """annotations.json in alpaca_eval's format; the preference is null where there is no verdict."""
    preferences = {line["question"]: line["preference"] for line in done}
    return [pair | {"annotator": annotator, "preference": preferences.get(pair["instruction"])}
            for pair in pairs]


async def keep_verdicts(verdicts, total: int, figure: str, journal: Journal) -> list[NoVerdict]:
    """Add the verdicts to the journal as they come; why the other pairs have none."""
    failed = []
    with progress(total=total, initial=len(journal.done), desc="judged", unit="pair") as bar:
        async for pair, found in verdicts:
            if isinstance(found, NoVerdict):
                failed.append(found)
                bar.set_postfix_str(f"{len(failed)} without a verdict")
            else:
                journal.add({"question": pair["instruction"], **found,
                             "scores": {figure: 100 * (found["preference"] - 1)}})
            bar.update()
    return failed


def describe_failures(failed: list[NoVerdict], pairs: int) -> str:
    """How many pairs have no verdict, and for each kind of failure the first message."""
    if not failed:
        return ""
    counts = Counter(fault.kind for fault in failed)
    messages = {fault.kind: fault.message for fault in reversed(failed)}
    return (f"{len(failed)} of {pairs} pairs have no verdict; the same command asks them again:\n"
            + "".join(f"  {number} {kind}: {messages[kind]}\n" for kind, number in counts.most_common()))


def judge_details(lines: list[dict], price_in: float, price_out: float) -> dict:
    """How the verdicts were read, and what they took; printed, too. Prices are USD for a million tokens."""
    read, written = (sum(line[key] for line in lines) for key in ("prompt_tokens", "completion_tokens"))
    cost = (read * price_in + written * price_out) / 1e6
    readings = Counter(line["reading"] for line in lines)
    refused = set().union(*(line["refused"] for line in lines))
    print(f"verdicts by {describe_counts(readings)}; {read:,} tokens read, {written:,} written"
          + (f", {cost:.2f} USD" if cost else ""))
    if refused:
        print(f"the judge's server does not take {', '.join(sorted(refused))}: asked without")
    return {"readings": readings, "refused options": sorted(refused), "cost_usd": cost,
            "tokens": {"read": read, "written": written}}
