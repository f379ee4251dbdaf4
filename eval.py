"""Evaluation: talk to a model, and measure what it answers.

    python eval.py ask --adapter runs/sw/clo/adapter "Mji mkuu wa Ufaransa ni upi?"
    python eval.py ask --adapter runs/sw/clo/adapter --beside   # a small conversation, the base beside it
    python eval.py mc mmlu DIR --shots 5 --adapter runs/sw/clo/adapter
    python eval.py COMMAND --help

Each command keeps its answers in a file as they come, so that a killed one goes on behind them, and writes
its figures beside everything they depend on; `compare` puts them into one table.
"""

import argparse
import asyncio
import json
import math
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import model as llama
from engine import flags, ranks
from engine.files import InputError, Journal, check_unicode, fingerprint, run, write_json
from engine.flags import REQUIRED
from engine.progress import progress
from evals import choice, comparison, judge, plots
from evals.answers import Decoding
from evals.instructions import (answer_instructions, model_outputs, read_instructions,
                                translate_instructions)
from evals.report import table, with_error
from evals.systems import (DEFAULT_MODEL, check_system, compute_dtype, directory_name, find_base, open_model,
                           out_directory)
from evals.verdict import VERDICT
from evals.winrate import (annotation_records, answer_settings, describe_failures, describe_rate,
                           judge_details, keep_verdicts, left_to_judge, pair_outputs, read_annotations,
                           win_rate)
from formats import hub
from formats.chat import Tokenizer, load_tokenizer
from formats.languages import normal, split_commas
from formats.records import describe_counts, read_rows, require_languages
from formats.weights import DTYPES, adapter_base

JUDGE = "gpt-4o"
OUTPUTS = "model_outputs"            # what alpaca_eval calls a file of answers; its directory names the system


# ---------------------------------------------------------------------------------------------------- figures

def finish(out: Path, settings: dict, figures: dict, **details) -> None:
    """result.json: the figures and everything they depend on. `compare` reads it."""
    write_json(out / "result.json", {"figures": figures, **details, "settings": settings})
    print(f"settings and details: {out}/result.json; answers: {out}/answers.jsonl")


# -------------------------------------------------------------------------------------------------------- ask

def tell_notes(tokenizer: Tokenizer) -> None:
    """Where prompts and replies differ from the text the chat template itself would write."""
    for note in tokenizer.chat.notes:
        print(note, file=sys.stderr)


def decoding(args) -> Decoding:
    return Decoding(args.system_prompt, args.max_tokens, args.temperature, args.top_p, args.seed)


def ask(args) -> None:
    """Answer one question, or questions typed one at a time until an empty line. Each stands alone."""
    adapters = args.adapter or []
    base = find_base(args.model, adapters[0] if adapters else None)
    for adapter in adapters if not args.model else []:
        if adapter_base(adapter) != base:
            raise InputError(f"{adapter} belongs to {adapter_base(adapter)}, {adapters[0]} to {base}: "
                             f"ask them one after the other, or name one base with --model")
    systems = [None, *adapters] if args.beside or not adapters else adapters
    for system in systems:
        check_system(base, system)
    tokenizer = load_tokenizer(base, args.template_args)
    dtype = DTYPES[compute_dtype(args.dtype, args.device)]
    tell_notes(tokenizer)
    models = {}
    for system in systems:
        print(f"loading {base}{f' with {system}' if system else ''}", file=sys.stderr, flush=True)
        models[system or base] = llama.load(base, args.device, dtype, system)
    if args.question is not None:
        answer_with_all(models, tokenizer, args.question, decoding(args))
        return
    print(f"{', '.join(models)}. Ask; an empty line ends.")
    while question := next_question():
        answer_with_all(models, tokenizer, question, decoding(args))


def next_question() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def answer_with_all(models: dict, tokenizer, question: str, how: Decoding) -> None:
    """Print every model's answer, under its name if there are several."""
    check_unicode(question, "the question")
    for name, model in models.items():
        if len(models) > 1:
            print(f"{name}:", flush=True)
        print(f"answering, at most {how.max_tokens} tokens", file=sys.stderr, flush=True)
        (text, tokens), = how.replies(model, tokenizer, [question])
        print(text or "(an empty reply)")
        if tokens >= how.max_tokens:
            print(f"(cut at --max-tokens {how.max_tokens})")


# -------------------------------------------------------------------------------------------- multiple choice

def mc(args) -> None:
    """Score a multiple-choice benchmark: accuracies with their standard error,
    and every question's log-probs."""
    subjects = sorted({*split_commas(args.subjects or "")})
    benchmark = choice.read_benchmark(args.benchmark, args.files, args.shots, args.lang, subjects, args.split,
                                      args.limit)
    model, tokenizer, settings = open_model(args.model, args.adapter, args.device, args.dtype)
    del settings["tokenizer and template"]         # a question is plain text: a template has no part in it
    settings |= {"tokenizer": fingerprint(tokenizer.full.to_str(), tokenizer.names)} | benchmark.settings
    name = [args.benchmark, args.lang, f"{args.shots}-shot", args.split if args.split != "test" else "",
            short(subjects), f"first {args.limit}" if args.limit else ""]
    figure = " ".join(filter(None, name))
    out = args.out or out_directory(args.adapter or args.model, *name, settings["dtype"])
    questions, numbers = {}, Counter()
    for question in benchmark.questions:
        numbers[question.subject] += 1
        questions[f"{question.subject} {numbers[question.subject]}"] = question
    keys = ("question", "correct", "choice", "cut", "scores")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        score_questions(model, tokenizer, questions, figure, journal, args.batch_tokens)
    answers = {line["question"]: line for line in journal.done}
    summary = choice.summarise(benchmark, [answers[name] for name in questions])
    total = summary["all"]
    categories = {f"all of {name}": part for name, part in summary["categories"].items()}
    print(table([figure, "accuracy %", "questions"],
                [[name, with_error(part["accuracy"], part["stderr"], 2), str(part["n"])]
                 for name, part in {**summary["subjects"], **categories, "all": total}.items()]))
    cut = tell_cut(journal)
    finish(out, settings, {figure: {"value": total["accuracy"], "stderr": total["stderr"], "n": total["n"]}},
           **summary, cut=cut)


def short(subjects: list[str]) -> str:
    """Names of subjects for a figure and a directory; of many, how many and a hash."""
    text = ",".join(subjects)
    return text if len(text) <= 60 else f"{len(subjects)} subjects {fingerprint(subjects)[:6]}"


def tell_cut(journal: Journal) -> int:
    """How many prompts were cut; said, since it lowers scores."""
    cut = sum(line["cut"] for line in journal.done)
    if cut:
        print(f"{cut} of {len(journal.done)} prompts were longer than the model reads and lost their start")
    return cut


def score_questions(model, tokenizer, questions: dict, figure: str, journal: Journal,
                    batch_tokens: int) -> None:
    """Add a line for each of {name: Question} that the journal does not hold yet."""
    done = {line["question"] for line in journal.done}
    left = [name for name in questions if name not in done]
    with progress(total=len(questions), initial=len(done), desc=figure, unit="question") as bar:
        for i, found in choice.score(model, tokenizer, [questions[name] for name in left], batch_tokens):
            journal.add({"question": left[i], "gold": questions[left[i]].gold, **found,
                         "scores": {figure: 100.0 * found["correct"]}})
            bar.update()


# ------------------------------------------------------------------------------------------------- perplexity

def ratio(nll: list[float], sizes: list[int]) -> dict:
    """sum(nll) / sum(sizes), with the standard error of a ratio over rows (Cochran 1977, ch. 2)."""
    n, value = len(nll), sum(nll) / sum(sizes)
    spread = sum((x - value * size) ** 2 for x, size in zip(nll, sizes))
    return {"value": value, "stderr": math.sqrt(spread * n / (n - 1)) / sum(sizes) if n > 1 else None, "n": n}


def perplexity(args) -> None:
    """NLL of held-out responses per UTF-8 byte (the stop token's too), in nats and in bits, which models with
    other tokenizers can be compared with, and its exponential."""
    args.data = str(hub.data_file(args.data))
    rows = scored_rows(args)
    model, tokenizer, settings = open_model(args.model, args.adapter, args.device, args.dtype,
                                            args.template_args)
    tell_notes(tokenizer)
    settings |= {
        "language": args.lang,
        "source": args.source,
        "data": args.data,
        "data hash": fingerprint(Path(args.data)),
        "split": args.split,
        "rows": len(rows),
        "system_prompt": args.system_prompt,
        "scored": "the response and its stop token, after the prompt"}
    name = [
        "perplexity",
        args.lang,
        args.source if args.source != "en" else "",
        Path(args.data).with_suffix("").as_posix().strip("./"),
        args.split if args.split != "test" else "",
        fingerprint(args.system_prompt)[:6] if args.system_prompt else "",
        settings["dtype"]]
    out = args.out or out_directory(args.adapter or args.model, *name)
    places = ((comparison.SOURCE, args.source), (comparison.TARGET, args.lang))
    keys = ("question", "place", "nll", "bytes", "tokens", "cut")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        for place, language in places:
            score_responses(model, tokenizer, rows, place, language, journal, args)
    figures, cells = {}, []
    for place, language in places:
        found, shown = byte_figures(place, [line for line in journal.done if line["place"] == place])
        figures |= found
        cells.append([language, *shown])
    print(table(["", "bits per byte", "nll per byte", "perplexity per byte", "nll per token", "rows"], cells))
    finish(out, settings, figures, cut=tell_cut(journal))


def scored_rows(args) -> list[dict]:
    """The rows of --data in both languages and of --split."""
    counts = Counter()
    rows = read_rows(args.data, args.source, counts=counts, targets=[args.lang], unique=True)
    rows = require_languages(rows, args.source, args.lang)
    print(f"{args.data}: {describe_counts(counts)}")
    if args.split:
        rows = [row for row in rows if row.get("split", args.split) == args.split]
    if not rows:
        raise InputError(f"{args.data} has no row of split {args.split!r}: see --split")
    return rows


def byte_figures(place: str, lines: list[dict]) -> tuple[dict, list[str]]:
    """Figures of one language's answers, and the cells that show them."""
    nats = ratio([line["nll"] for line in lines], [line["bytes"] for line in lines]) | {"digits": 4}
    bits = nats | {key: nats[key] and nats[key] / math.log(2) for key in ("value", "stderr")}
    exponential = {"value": math.exp(nats["value"]), "n": nats["n"], "digits": 4}
    per_token = sum(line["nll"] for line in lines) / sum(line["tokens"] for line in lines)
    figures = {
        f"bits/byte {place}": bits,
        f"nll/byte {place}": nats,
        f"perplexity/byte {place}": exponential}
    cells = [
        with_error(bits["value"], bits["stderr"], 4),
        with_error(nats["value"], nats["stderr"], 4),
        f"{exponential['value']:.4f}",
        f"{per_token:.4f}",
        str(nats["n"])]
    return figures, cells


def score_responses(model, tokenizer, rows: list[dict], place: str, language: str,
                    journal: Journal, args) -> None:
    """Add the NLL of each row's response in `language` to the journal."""
    done = {line["question"] for line in journal.done if line["place"] == place}
    left, longest = [row for row in rows if row["row_id"] not in done], model.config.max_position_embeddings
    if not left:
        return
    replies = [tokenizer.response_ids(row[language]["response"]) for row in left]
    long = [row["row_id"] for row, reply in zip(left, replies) if len(reply) > longest]
    if long:
        raise InputError(f"{args.data}: {len(long)} responses in {language} are longer than "
                             f"the {longest} tokens the model reads: leave out rows {', '.join(long)}")
    parts = [part for i, (row, reply) in enumerate(zip(left, replies)) for part in choice.make_parts(
        i, row["row_id"], tokenizer.prompt_ids(row[language]["prompt"], args.system_prompt),
        [reply], longest)]
    forks = [part.fork for part in parts]
    shared = choice.common_prefix([fork.prompt for fork in forks])
    with progress(total=len(rows), initial=len(done), desc=f"nll {language}", unit="row") as bar:
        for order, logps in choice.sequence_logps(model, forks, args.batch_tokens, shared):
            for i, (logp,) in zip(order, logps):
                journal.add({"question": left[i]["row_id"], "place": place, "nll": -logp, "cut": parts[i].cut,
                             "bytes": len(left[i][language]["response"].encode()),
                             "tokens": len(forks[i].continuations[0])})
            bar.update(len(order))


# ------------------------------------------------------------------------------------------------- AlpacaEval

def alpaca(args) -> None:
    """Answer a list of instructions; model_outputs.json is what alpaca_eval and `judge` read."""
    language = args.source if args.translator else args.lang
    items = read_instructions(args.instructions, language)[:args.limit]
    check_system(find_base(args.model, args.adapter), args.adapter)
    if args.translator:
        items = translate_instructions(items, args.translator, args.device, args.source, args.lang,
                                       args.beams)
    model, tokenizer, settings = open_model(args.model, args.adapter, args.device, args.dtype,
                                            args.template_args)
    tell_notes(tokenizer)
    how = decoding(args)
    settings |= {
        "language": args.lang,
        "instructions": args.instructions,
        "translator": args.translator,
        "instructions hash": fingerprint([item["instruction"] for item in items]),
        "batch": args.batch_size,
        **asdict(how)}
    system = args.adapter or args.model
    part = f"first {args.limit}" if args.limit else ""
    out = args.out or out_directory(system, "alpaca", args.lang, part)
    keys = ("instruction", "output", "tokens")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        answer_instructions(model, tokenizer, items, how, args.batch_size, journal)
    name = args.name or Path(system or DEFAULT_MODEL).as_posix()
    write_json(out / "model_outputs.json", model_outputs(items, journal.done, name))
    length = sum(len(line["output"]) for line in journal.done) / len(items)
    cut = sum(line["tokens"] >= how.max_tokens for line in journal.done)
    empty = sum(not line["output"] for line in journal.done)
    print(f"{out}/model_outputs.json: {len(items)} answers of {length:.0f} characters on average, "
          f"{cut} of them cut at {how.max_tokens} tokens, {empty} empty")
    figures = {"answer characters": {"value": length, "n": len(items)}}
    finish(out, settings, figures, cut=cut, empty=empty)


# ------------------------------------------------------------------------------------------------------ judge

def judge_outputs(args) -> None:
    """Ask the judge about every pair of answers:
    annotations.json in alpaca_eval's format, and the win rate of A."""
    asked = judge.connect(args.judge_model, args.judge_tokens, args.timeout, args.attempts)
    pairs = pair_outputs(args.outputs, args.reference)[:args.limit]
    settings = answer_settings(args.outputs, args.reference)
    settings |= {
        "pairs": len(pairs),
        "judge": args.judge_model,
        "judge prompt": judge.prompt_hash(),
        "judge tokens": args.judge_tokens,
        "judge temperature": 0,
        "verdict": VERDICT,
        "order": args.order,
        "order seed": args.seed,
        "language": args.lang or settings.get("language")}
    out = args.out or judge_directory(args)
    model, reference = pairs[0]["generator_2"], pairs[0]["generator_1"]
    figure = f"win rate over {reference}"
    keys = ("question", "preference", "reading", "refused", "prompt_tokens", "completion_tokens")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        left, known = left_to_judge(pairs, journal.done)
        verdicts = judge.annotate_all(left, asked, args.order, args.seed, args.lang, args.parallel, known)
        failed = asyncio.run(keep_verdicts(verdicts, len(pairs), figure, journal))
    print(describe_failures(failed, len(pairs)), end="")
    annotator = f"{args.judge_model}, {args.order} order, prompt {judge.prompt_hash()}"
    annotations = annotation_records(pairs, journal.done, annotator)
    write_json(out / "annotations.json", annotations)
    rate = win_rate(annotations)
    print(f"{model} against {reference}: {describe_rate(rate)}")
    details = judge_details(journal.done, args.price_in, args.price_out)
    kinds = Counter(fault.kind for fault in failed)
    value = {"value": rate["win_rate"], "stderr": rate["standard_error"], "n": rate["n_total"]}
    finish(out, settings, {figure: value}, win_rate=rate, failed=kinds, **details)


def judge_directory(args) -> Path:
    """Beside the answers; whatever is not the default has a directory of its own."""
    model, reference = Path(args.outputs), Path(args.reference)
    name = [model.stem] if model.stem != OUTPUTS else []
    name += ["against", reference.stem if reference.stem != OUTPUTS else reference.parent.name]
    name += [args.judge_model] if args.judge_model != JUDGE else []
    name += [args.order] if args.order != "random" else []
    name += [f"seed {args.seed}"] if args.seed else []
    name += [f"first {args.limit}"] if args.limit else []
    return model.parent / directory_name(*name)


def winrate(args) -> None:
    """The win rate that a file of annotations in alpaca_eval's format gives."""
    rate = win_rate(read_annotations(args.annotations))
    print(describe_rate(rate))
    print(json.dumps(rate | {"annotations hash": fingerprint(Path(args.annotations))}))


# ---------------------------------------------------------------------------------------------------- compare

def compare(args) -> None:
    """One table over runs and evaluations, paired differences from the baseline, and plots when asked."""
    if args.plot:
        plots.import_pyplot()
        if Path(args.plot).is_file():
            raise InputError(f"--plot {args.plot}: a file, a directory is wanted")
    directories, left_out = comparison.find_results(args.runs)
    if left_out:
        print(f"left out, no finished run or evaluation: {', '.join(map(str, left_out))}\n")
    results = comparison.read_results(directories)
    print(comparison.comparison_text(results, args.baseline))
    print(comparison.settings_text(directories))
    if args.plot:
        for path in plots.plot(results, args.plot):
            print(f"plot: {path}")


# ----------------------------------------------------------------------------------------------- command line

def add_model_flags(parser, adapter_kind=str, more: str = ""):
    add = flags.group(parser, "model")
    add("--model", str, None, "directory or hub id; default: the adapter's base, else demo/llama")
    add("--adapter", adapter_kind, None, f"PEFT LoRA adapter, a directory or hub id{more}")
    add("--device", str, "auto", "auto, cpu, cuda, cuda:1, mps")
    add("--dtype", ["auto", *DTYPES], "auto", "compute type; auto: bf16 on CUDA, else fp32")
    return add


def add_output_flags(parser) -> None:
    add = flags.group(parser, "files")
    add("--out", Path, None, "directory of the answers; default: named after what is evaluated")
    add("--fresh", bool, False, "start over instead of going on behind the answers that are there")


def add_answer_flags(parser, max_tokens: int) -> None:
    add = flags.group(parser, "answers")
    add("--system-prompt", str, None, "put before every question, in the model's chat template")
    add("--template-args", str, None, "variables of the chat template: '{\"enable_thinking\": false}'")
    add("--temperature", flags.temperature, 0.0, "0 is greedy; higher is more varied")
    add("--top-p", flags.share, 1.0, "sample from the likeliest tokens that hold this probability")
    add("--max-tokens", flags.positive_int, max_tokens, "longest answer, in tokens")
    add("--seed", flags.seed, 0, "of the sampling")


def add_ask(parser) -> None:
    parser.add_argument("question", nargs="?", help="without it, questions are read from the terminal")
    add = add_model_flags(parser, list, "; several: --adapter A --adapter B")
    add("--beside", bool, False, "show what the base answers, too")
    add_answer_flags(parser, 256)


def add_mc(parser) -> None:
    parser.add_argument("benchmark", choices=list(choice.TASKS), help="how its files are read and asked")
    parser.add_argument("files", help="its directory as distributed (csv, tsv, jsonl), or hub id")
    add = flags.group(parser, "questions")
    add("--shots", flags.count, 0, "worked examples before each question; tables mostly use 5")
    add("--lang", normal, "", "of MMMLU, BELEBELE: sw, or its own code (SW-KE, swh_Latn)")
    add("--subjects", str, None, "only these, joined by commas")
    add("--split", str, "test", "the split asked")
    add("--limit", flags.positive_int, None, "the first so many questions of every subject")
    add("--batch-tokens", flags.positive_int, 2048, "tokens of one forward pass")
    add_model_flags(parser)
    add_output_flags(parser)


def add_perplexity(parser) -> None:
    add = flags.group(parser, "responses")
    add("--data", str, "demo/eval.jsonl", "held-out parallel rows")
    add("--lang", normal, REQUIRED, "target language")
    add("--source", normal, "en", "source language")
    add("--split", str, "test", 'rows of this split, and rows without one; "" takes all')
    add("--system-prompt", str, None, "put before every question, in the model's chat template")
    add("--template-args", str, None, "variables of the chat template: '{\"enable_thinking\": false}'")
    add("--batch-tokens", flags.positive_int, 2048, "tokens of one forward pass")
    add_model_flags(parser)
    add_output_flags(parser)


def add_alpaca(parser) -> None:
    add = flags.group(parser, "instructions")
    add("--instructions", str, REQUIRED, "JSON with \"instruction\"s (alpaca_eval's), or parallel rows")
    add("--lang", normal, REQUIRED, "their language; with --translator, the one translated into")
    add("--translator", str, None, "M2M100 or NLLB directory: translate the instructions first")
    add("--source", normal, "en", "language translated from")
    add("--beams", flags.positive_int, 5, "beam width of the translation")
    add("--name", str, None, "generator's name in the output; default: the adapter or model")
    add("--limit", flags.positive_int, None, "the first so many instructions")
    add("--batch-size", flags.positive_int, 32, "answers generated at once, and saved together")
    add_answer_flags(parser, 1024)
    add_model_flags(parser)
    add_output_flags(parser)


def add_judge(parser) -> None:
    parser.add_argument("outputs", metavar="A.json", help="answers in question (model_outputs.json)")
    parser.add_argument("reference", metavar="B.json", help="answers they are compared with")
    add = flags.group(parser, "judge")
    add("--judge-model", str, JUDGE, "name the server knows it by")
    add("--lang", normal, "", "language the answers should be in, named to the judge")
    add("--order", ["random", "both"], "random", "alpaca_eval's coin, or each pair twice")
    add("--seed", flags.seed, 0, "of the coin")
    add("--limit", flags.positive_int, None, "the first so many pairs")
    add("--judge-tokens", flags.positive_int, 1, "room of the first reply; 8192 for a judge that reasons")
    add("--price-in", flags.not_negative, 0.0, "USD for a million tokens read")
    add("--price-out", flags.not_negative, 0.0, "USD for a million tokens written")
    add = flags.group(parser, "server (OPENAI_BASE_URL, OPENAI_API_KEY)")
    add("--parallel", flags.positive_int, 8, "requests at a time")
    add("--timeout", flags.positive, 300.0, "seconds for a request")
    add("--attempts", flags.positive_int, 6, "requests before a pair is given up")
    add_output_flags(parser)


def add_winrate(parser) -> None:
    parser.add_argument("annotations", metavar="annotations.json", help="in alpaca_eval's format")


def add_compare(parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="directories of clo.py, mc, perplexity and judge, or what holds them")
    add = flags.group(parser, "table")
    add("--baseline", str, "sft", "method the others are compared with, question by question")
    add("--plot", str, None, "draw learning curves and the trade-off into this directory")


COMMANDS = {                     # name: (flags, function, what it is, an example)
    "ask": (add_ask, ask, "one answer, or a small terminal conversation",
            'ask --adapter runs/sw/clo/adapter --beside "Mji mkuu wa Ufaransa ni upi?"'),
    "mc": (add_mc, mc, "multiple choice: MMLU, MMMLU, CMMLU, BELEBELE",
           "mc belebele data/belebele --lang sw --shots 5 --adapter runs/sw/clo/adapter"),
    "perplexity": (add_perplexity, perplexity, "NLL of held-out responses per byte, in both languages",
                   "perplexity --lang sw --adapter runs/sw/clo/adapter"),
    "alpaca": (add_alpaca, alpaca, "answers to a list of instructions, in alpaca_eval's format",
               "alpaca --instructions alpaca_eval.json --lang sw --translator m2m100_1.2B "
               "--adapter runs/sw/clo/adapter"),
    "judge": (add_judge, judge_outputs, "win rate by a judge behind an OpenAI-compatible server",
              "judge clo/model_outputs.json sft/model_outputs.json --lang sw\n"
              "(needs the openai package, and OPENAI_API_KEY; for a server of your own, which needs no key, "
              "export OPENAI_BASE_URL=http://localhost:8000/v1)"),
    "winrate": (add_winrate, winrate, "win rate of a finished file of annotations",
                "winrate clo/against-sft/annotations.json"),
    "compare": (add_compare, compare, "one table over many runs, with plots",
                "compare runs/sw runs/yo --plot plots")}


def parse_args(argv=None) -> argparse.Namespace:
    parser = flags.Parser(prog="eval.py", description="Talk to a model, and measure what it answers.",
                          epilog="python eval.py COMMAND --help says more.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_flags, command, what, example) in COMMANDS.items():
        sub = commands.add_parser(name, help=what, description=what,
                                  epilog=f"Example:\n  python eval.py {example}")
        add_flags(sub)
        sub.set_defaults(run=command)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if "device" in args:
        args.device = ranks.pick_device(args.device)
    if isinstance(getattr(args, "adapter", None), list):
        args.adapter = [str(hub.local_adapter(name)) for name in args.adapter]
    elif getattr(args, "adapter", None):
        args.adapter = str(hub.local_adapter(args.adapter))
    args.run(args)


if __name__ == "__main__":
    run(main)
