"""Evaluation: talk to a model, and measure what it answers.

    python eval.py ask --adapter runs/sw/clo/adapter "Mji mkuu wa Ufaransa ni upi?"
    python eval.py ask --adapter runs/sw/clo/adapter --beside   # a small conversation, the base beside it
    python eval.py mc mmlu DIR --shots 5 --adapter runs/sw/clo/adapter
    python eval.py COMMAND --help

mc, perplexity, alpaca and judge keep their answers in a file as they come, so that a killed one goes on
behind them, and write their figures beside all that they depend on; `compare` puts them into one table. A
notebook may rely on multiple_choice, fit_languages, reply_language and answer_and_score.
"""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import translate
from data import print_notes
from engine import flags, ranks
from engine.files import InputError, Journal, check_unicode, fingerprint, run, write_json
from engine.flags import REQUIRED
from evals import choice, comparison, judge, plots, winrate
from evals.answers import Decoding, answer_and_score    # noqa: F401
from evals.choice import multiple_choice    # noqa: F401
from evals.instructions import answer_lines, model_outputs, read_instructions, translate_instructions
from evals.language import fit_languages, reply_language    # noqa: F401
from evals.perplexity import byte_figures, response_lines, scored_rows
from evals.report import shown, table
from evals.systems import (check_system, count_cut, finish, is_same, keep, locate, open_model, out_directory,
                           unusual)
from evals.verdict import VERDICT
from formats import hub
from formats.languages import normal, split_commas
from formats.weights import DTYPES

JUDGE = "gpt-4o"


# -------------------------------------------------------------------------------------------------------- ask

def ask(args) -> None:
    """Answer one question, or questions typed one at a time until an empty line. Each stands alone."""
    if args.question is not None and not args.question.strip():
        raise InputError("the question is empty")
    if args.beside and not args.adapter:
        raise InputError("--beside shows what an adapter's base answers: give --adapter, or leave it out")
    found = [locate(args.model, adapter) for adapter in args.adapter or [None]]
    (base, first), *others = found
    for own, adapter in others:
        if not is_same(own, base):
            raise InputError(f"{adapter} belongs to {own}, {first} to {base}: "
                             f"ask them one after the other, or name one base with --model")
    systems = [(base, None)] if args.beside and first else []
    systems += [(args.model, adapter) for _, adapter in found]
    models = {}
    with contextlib.redirect_stdout(sys.stderr):            # answers alone go to standard output
        for system in systems:
            check_system(*system)
        for system in systems:
            model, tokenizer, settings = open_model(*system, args.device, args.dtype, args.template_args)
            if not models:
                print_notes(tokenizer)
            models[settings["adapter"] or settings["model"]] = model, tokenizer
    how = Decoding(
        args.system_prompt, args.max_tokens,
        args.temperature, args.top_p, args.seed)
    if args.question is not None:
        answer_with_all(models, args.question, how)
        return
    print(f"{', '.join(models)}. Ask; an empty line ends.")
    while question := next_question():
        answer_with_all(models, question, how)


def next_question() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def answer_with_all(models: dict[str, tuple], question: str, how: Decoding) -> None:
    """Print the answer of every (model, tokenizer), under its name if there are several."""
    check_unicode(question, "the question")
    for name, (model, tokenizer) in models.items():
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
    benchmark = choice.read_benchmark(
        args.benchmark, args.files, args.shots,
        args.lang, subjects, args.split, args.limit)
    model, tokenizer, settings = open_model(args.model, args.adapter, args.device, args.dtype)
    del settings["tokenizer and template"]         # a question is plain text: a template has no part in it
    settings |= {"tokenizer": fingerprint(tokenizer.full.to_str(), tokenizer.names)} | benchmark.settings
    name = [
        args.benchmark,
        args.lang,
        f"{args.shots}-shot",
        unusual(args.split, "test"),
        ",".join(subjects),
        unusual(args.limit, None, "first {}")]
    figure = " ".join(filter(None, name))
    out = args.out or out_directory(settings, *name, settings["dtype"])
    keys = ("question", "correct", "choice", "cut", "scores")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        done = {line["question"] for line in journal.done}
        scored = choice.score_questions(model, tokenizer, benchmark.questions, args.batch_tokens, done)
        lines = (line | {"scores": {figure: 100.0 * line["correct"]}} for _, line in scored)
        keep(journal, lines, len(benchmark.questions), figure, "question")
    summary = choice.summarise(benchmark, {line["question"]: line for line in journal.done})
    categories = {f"all of {category}": found for category, found in summary["categories"].items()}
    parts = {**summary["subjects"], **categories, "all": summary["all"]}
    cells = [[part, shown(found), str(found["n"])] for part, found in parts.items()]
    print(table([figure, "accuracy %", "questions"], cells))
    absent = [] if subjects else benchmark.absent()
    if absent:
        print(f"not asked, the files lack them: {first_three(absent)}")
    if strange := benchmark.strange():
        print(f"no subjects of {args.benchmark}, in none of its categories: {first_three(strange)}")
    finish(out, settings, {figure: summary["all"]}, **summary, absent=absent, strange=strange,
           cut=count_cut(journal))


def first_three(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


# ------------------------------------------------------------------------------------------------- perplexity

def perplexity(args) -> None:
    """NLL of held-out responses per UTF-8 byte (the stop token's too), in nats and in bits, which models with
    other tokenizers can be compared with, and its exponential."""
    if args.source == args.lang:
        raise InputError(f"--source and --lang are both {args.lang}: give two languages")
    path = hub.data_file(args.data)
    rows = scored_rows(path, args.source, args.lang, args.split)
    model, tokenizer, settings = open_model(
        args.model, args.adapter, args.device,
        args.dtype, args.template_args)
    print_notes(tokenizer, sys.stderr)
    settings |= {
        "language": args.lang,
        "source": args.source,
        "data": str(path),
        "data hash": fingerprint(path),
        "split": args.split,
        "rows": len(rows),
        "system_prompt": args.system_prompt,
        "scored": "the response and its stop token, after the prompt"}
    name = [
        "perplexity",
        args.lang,
        unusual(args.source, "en"),
        path.with_suffix("").as_posix().strip("./"),
        unusual(args.split, "test"),
        fingerprint(args.system_prompt)[:6] if args.system_prompt else "",
        settings["dtype"]]
    out = args.out or out_directory(settings, *name)
    places = {comparison.SOURCE: args.source, comparison.TARGET: args.lang}
    keys = ("question", "place", "nll", "bytes", "tokens", "cut")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        done = {(line["place"], line["question"]) for line in journal.done}
        lines = response_lines(
            model, tokenizer, rows, places, done,
            args.system_prompt, args.batch_tokens)
        keep(journal, lines, 2 * len(rows), "nll", "response")
    figures, cells = {}, []
    for place, language in places.items():
        lines = [line for line in journal.done if line["place"] == place]
        found = byte_figures(place, lines)
        per_token = sum(line["nll"] for line in lines) / sum(line["tokens"] for line in lines)
        cells.append([language, *map(shown, found.values()), f"{per_token:.4f}", str(len(lines))])
        figures |= found
    header = ["", "bits per byte", "nll per byte", "perplexity per byte", "nll per token", "rows"]
    print(table(header, cells))
    finish(out, settings, figures, cut=count_cut(journal))


# ------------------------------------------------------------------------------------------------- AlpacaEval

def alpaca(args) -> None:
    """Answer a list of instructions; model_outputs.json is what alpaca_eval and `judge` read."""
    language = args.source if args.translator else args.lang
    items = read_instructions(args.instructions, language)[:args.limit]
    check_system(args.model, args.adapter)
    if args.translator:
        items = translate_instructions(         # the translator is gone before the model comes
            items, translate.translate, translate.load(args.translator, args.device),
            args.source, args.lang, args.beams)
    model, tokenizer, settings = open_model(
        args.model, args.adapter, args.device,
        args.dtype, args.template_args)
    print_notes(tokenizer, sys.stderr)
    how = Decoding(
        args.system_prompt, args.max_tokens,
        args.temperature, args.top_p, args.seed)
    settings |= {
        "language": args.lang,
        "instructions": args.instructions,
        "translator": args.translator,
        "instructions hash": fingerprint([item["instruction"] for item in items]),
        "batch": args.batch_size,
        **asdict(how)}
    out = args.out or out_directory(settings, "alpaca", args.lang, unusual(args.limit, None, "first {}"))
    keys = ("instruction", "output", "tokens")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        lines = answer_lines(model, tokenizer, items, how, args.batch_size, len(journal.done))
        keep(journal, lines, len(items), "answers", "answer")
    name = args.name or Path(settings["adapter"] or settings["model"]).as_posix()
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
    asked = replace(
        asked, parallel=args.parallel, order=args.order,
        seed=args.seed, language=args.lang)
    pairs = winrate.pair_outputs(args.outputs, args.reference)[:args.limit]
    settings = winrate.answer_settings(args.outputs, args.reference)
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
    name = [                              # whatever is not the default has a directory of its own
        unusual(args.judge_model, JUDGE),
        unusual(args.judge_tokens, 1, "{} tokens"),
        unusual(args.order, "random"),
        unusual(args.seed, 0, "seed {}"),
        unusual(args.limit, None, "first {}")]
    out = args.out or winrate.directory_of(Path(args.outputs), Path(args.reference), *name)
    model, reference = pairs[0]["generator_2"], pairs[0]["generator_1"]
    figure = f"win rate over {reference}"
    keys = ("question", "preference", "reading", "refused", "prompt_tokens", "completion_tokens")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        failed = judge.judge_pairs(pairs, asked, journal, figure)
    kinds = winrate.print_failures(failed, len(pairs))
    annotator = f"{args.judge_model}, {args.order} order, prompt {judge.prompt_hash()}"
    annotations = winrate.annotation_records(pairs, journal.done, annotator)
    write_json(out / "annotations.json", annotations)
    rate = winrate.win_rate(annotations)
    print(f"{model} against {reference}: {winrate.describe_rate(rate)}")
    details = winrate.judge_details(journal.done, args.price_in, args.price_out)
    value = {
        "value": rate["win_rate"],
        "stderr": rate["standard_error"],
        "n": rate["n_total"]}
    finish(out, settings, {figure: value}, win_rate=rate, failed=kinds, **details)


def count_wins(args) -> None:
    """The win rate that a file of annotations in alpaca_eval's format gives."""
    rate = winrate.win_rate(winrate.read_annotations(args.annotations))
    print(winrate.describe_rate(rate))
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
    add("--out", flags.directory, None, "of the answers; default: named after what is evaluated")
    add("--fresh", bool, False, "start over instead of going on behind the answers that are there")


def add_prompt_flags(add) -> None:
    add("--system-prompt", str, None, "put before every question, in the model's chat template")
    add("--template-args", str, None, "variables of the chat template: '{\"enable_thinking\": false}'")


def add_answer_flags(parser, max_tokens: int) -> None:
    add = flags.group(parser, "answers")
    add_prompt_flags(add)
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
    add_prompt_flags(add)
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
    "ask": (
        add_ask, ask, "one answer, or a small terminal conversation",
        'ask --adapter runs/sw/clo/adapter --beside "Mji mkuu wa Ufaransa ni upi?"'),
    "mc": (
        add_mc, mc, "multiple choice: MMLU, MMMLU, CMMLU, BELEBELE",
        "mc belebele data/belebele --lang sw --shots 5 --adapter runs/sw/clo/adapter"),
    "perplexity": (
        add_perplexity, perplexity, "NLL of held-out responses per byte, in both languages",
        "perplexity --lang sw --adapter runs/sw/clo/adapter"),
    "alpaca": (
        add_alpaca, alpaca, "answers to a list of instructions, in alpaca_eval's format",
        "alpaca --instructions alpaca_eval.json --lang sw --translator m2m100_1.2B "
        "--adapter runs/sw/clo/adapter"),
    "judge": (
        add_judge, judge_outputs, "win rate by a judge behind an OpenAI-compatible server",
        "judge clo/model_outputs.json sft/model_outputs.json --lang sw\n"
        "(needs the openai package, and OPENAI_API_KEY; for a server of your own, which needs no key, "
        "export OPENAI_BASE_URL=http://localhost:8000/v1)"),
    "winrate": (
        add_winrate, count_wins, "win rate of a finished file of annotations",
        "winrate clo/against-sft/annotations.json"),
    "compare": (
        add_compare, compare, "one table over many runs, with plots",
        "compare runs/sw runs/yo --plot plots")}


def parse_args(argv=None) -> argparse.Namespace:
    parser = flags.Parser(
        prog="eval.py",
        description="Talk to a model, and measure what it answers.",
        epilog="python eval.py COMMAND --help says more.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_flags, command, what, example) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=what, description=what,
            epilog=f"Example:\n  python eval.py {example}")
        add_flags(sub)
        sub.set_defaults(run=command)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if "device" in args:
        args.device = ranks.pick_device(args.device)
    args.run(args)


if __name__ == "__main__":
    run(main)
