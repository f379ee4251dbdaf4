"""AlpacaEval's files of answers and the arithmetic of its win rates, of whoever judged.

Its length-controlled rate is left out on purpose: its coefficients were fitted on the English instructions,
and mean lengths are reported instead.

References: AlpacaEval (Dubois et al., arXiv 2404.04475; github.com/tatsu-lab/alpaca_eval,
docs of the outputs format).
"""

from collections import Counter
from pathlib import Path

from engine.files import InputError, as_kind, check_unicode, fingerprint, need, read_json, read_records
from evals.figures import MEAN, Sample
from evals.report import shown
from evals.systems import directory_name, unusual
from evals.verdict import NoVerdict
from formats.records import describe_counts, refuse_duplicates

OUTPUTS = "model_outputs"        # what alpaca_eval calls a file of answers; its directory names the system


def read_outputs(path) -> dict[str, dict]:
    """{instruction: record} of a file in alpaca_eval's format;
    InputError for a missing text or a repeated instruction."""
    outputs, places = {}, []
    for where, record in read_records(path):
        for key in ("instruction", "output"):
            check_unicode(as_kind(need(record, key, where), str, f"{where}: {key}"), where)
        outputs[record["instruction"]] = record
        places.append((where, record["instruction"]))
    refuse_duplicates(places)
    if not outputs:
        raise InputError(f"{path}: the file holds no answers")
    return outputs


def pair_outputs(model_path, reference_path) -> list[dict]:
    """Records with both answers, joined on the exact instruction;
    output_1 is the reference's, as alpaca_eval has it."""
    model, reference = read_outputs(model_path), read_outputs(reference_path)
    pairs = []
    for instruction in filter(reference.get, model):
        first, second = reference[instruction], model[instruction]
        pairs.append({
            "instruction": instruction,
            "dataset": second.get("dataset"),
            "output_1": first["output"],
            "generator_1": first.get("generator", str(reference_path)),
            "output_2": second["output"],
            "generator_2": second.get("generator", str(model_path))})
    if not pairs:
        raise InputError(f"{model_path} and {reference_path} share no instruction: they must be equal "
                         f"byte for byte (eval.py alpaca keeps a translation and gives it to every system)")
    if len(pairs) < max(len(model), len(reference)):
        print(f"{len(pairs)} instructions are in both files; {len(model) - len(pairs)} only in {model_path}, "
              f"{len(reference) - len(pairs)} only in {reference_path}")
    return pairs


def is_preference(value) -> bool:
    """From 1 (output_1 wins) to 2, or the 0 of old files; no Boolean."""
    return type(value) in (int, float) and (value == 0 or 1 <= value <= 2)


def win_rate(annotations: list[dict]) -> dict:
    """alpaca_eval's figures, in %, of the second system: a preference of 2 is a win, 1 a loss, 1.5 a draw
    (0 in old files). Pairs without a preference are left out. Mean lengths in characters."""
    kept = [line for line in annotations if is_preference(line["preference"])]
    if not kept:
        raise InputError("no pair in the annotations has a preference: nothing to average")
    wins = [(line["preference"] or 1.5) - 1 for line in kept]
    rate = Sample(MEAN, {i: (100 * win, 1) for i, win in enumerate(wins)}).summary()
    n, won, lost = len(wins), sum(win > 0.5 for win in wins), sum(win < 0.5 for win in wins)
    return {
        "win_rate": rate["value"],
        "standard_error": rate["stderr"],
        "n_total": n,
        "n_wins": won,
        "n_wins_base": lost,
        "n_draws": n - won - lost,
        "discrete_win_rate": 50 + 50 * (won - lost) / n,
        "avg_length": round(sum(len(line["output_2"]) for line in kept) / n),
        "avg_length_base": round(sum(len(line["output_1"]) for line in kept) / n),
        "no_preference": len(annotations) - n}


def read_annotations(path) -> list[dict]:
    """The annotations of a file in alpaca_eval's format, some perhaps without a preference (null, NaN).
    InputError for a text or preference that is none, and for a question that is there twice, as in a file of
    several systems or judges."""
    annotations, asked = read_records(path), []
    for where, line in annotations:
        value = need(line, "preference", where)
        if value is not None and value == value and not is_preference(value):
            raise InputError(f"{where}: the preference is {value!r:.80}, "
                             f"from 1 (output_1 wins) to 2 is wanted")
        for key in ("output_1", "output_2"):
            as_kind(need(line, key, where), str, f"{where}: {key}")
        if "instruction" in line:
            asked.append((where, str(line["instruction"])))
    refuse_duplicates(asked)
    return [line for _, line in annotations]


def describe_rate(rate: dict) -> str:
    figure = shown({"value": rate["win_rate"], "stderr": rate["standard_error"]})
    number = f"n = {rate['n_total']}"
    if rate["no_preference"]:
        pairs = rate["n_total"] + rate["no_preference"]
        number += f" of {pairs} pairs, {rate['no_preference']} without a verdict"
    return (f"win rate {figure} % ({number}: {rate['n_wins']} won, "
            f"{rate['n_wins_base']} lost, {rate['n_draws']} drawn; "
            f"discrete {rate['discrete_win_rate']:.2f} %); "
            f"mean lengths {rate['avg_length']} against {rate['avg_length_base']} characters")


# ---------------------------------------------------------------------------------------------------- judging

def directory_of(model: Path, reference: Path, *names: str) -> Path:
    """Beside the answers, named after what they are compared with."""
    other = reference.stem if reference.stem != OUTPUTS else reference.parent.name
    return model.parent / directory_name(unusual(model.stem, OUTPUTS), "against", other, *names)


def answer_settings(outputs: str, reference: str) -> dict:
    """What made the answers, from the result.json beside them if there is one, and their hashes."""
    beside = Path(outputs).with_name("result.json")
    settings = need(read_json(beside, {"settings": {"model": outputs}}), "settings", beside)
    return as_kind(settings, dict, f"{beside}: settings") | {
        "outputs hash": fingerprint(Path(outputs)),
        "reference": reference,
        "reference hash": fingerprint(Path(reference))}


def annotation_records(pairs: list[dict], done: list[dict], annotator: str) -> list[dict]:
    """annotations.json in alpaca_eval's format; the preference is null where there is no verdict."""
    preferences = {line["question"]: line["preference"] for line in done}
    return [pair | {"annotator": annotator, "preference": preferences.get(pair["instruction"])}
            for pair in pairs]


def print_failures(failed: list[NoVerdict], pairs: int) -> Counter:
    """Print how many pairs have no verdict, and the first message of each kind of failure; how many there are
    of each."""
    kinds = Counter(fault.kind for fault in failed)
    messages = {fault.kind: fault.message for fault in reversed(failed)}
    if failed:
        print(f"{len(failed)} of {pairs} pairs have no verdict; the same command asks them again:")
    for kind, number in kinds.most_common():
        print(f"  {number} {kind}: {messages[kind]}")
    return kinds


def judge_details(lines: list[dict], price_in: float, price_out: float) -> dict:
    """How the verdicts were read, and what they took; printed, too. Prices are USD for a million tokens."""
    read = sum(line["prompt_tokens"] for line in lines)
    written = sum(line["completion_tokens"] for line in lines)
    cost = (read * price_in + written * price_out) / 1e6
    readings = Counter(line["reading"] for line in lines)
    refused = sorted(set().union(*(line["refused"] for line in lines)))
    print(f"verdicts by {describe_counts(readings)}; {read:,} tokens read, {written:,} written"
          + (f", {cost:.2f} USD" if cost else ""))
    if refused:
        print(f"the judge's server does not take {', '.join(refused)}: asked without")
    return {
        "readings": readings,
        "refused options": refused,
        "cost_usd": cost,
        "tokens": {"read": read, "written": written}}
