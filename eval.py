"""Evaluation: exact answers, the language of replies, the report of a run, and a prompt to talk to a model.

    python eval.py ask --adapter runs/sw/clo/adapter "Mji mkuu wa Ufaransa ni upi?"
    python eval.py ask --adapter runs/sw/clo/adapter    # a small conversation, one question at a time

A reply is *correct* when, normalised (Unicode NFC, case, spaces, final punctuation), it equals the row's
response in the language of the question. Whether it is in the *right language* is judged by a naive Bayes
classifier over character n-grams, fitted on the run's own parallel rows: it knows no language by name, only
the ones it was given. Rows whose response is the same in another language say nothing about language; they
are left out of that figure and counted.

References: naive Bayes over n-grams for language identification (Lui and Baldwin 2012, langid.py).
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import model as llama
import translate
from engine import ranks
from engine.files import (InputError, Journal, as_kind, check_unicode, fingerprint, need, read_records, run,
                          write_json)
from evals import choice, judge, report
from evals.answers import HASH_DIGITS, answer_and_score  # noqa: F401  the library face
from evals.choice import multiple_choice  # noqa: F401
from evals.language import fit_languages, reply_language  # noqa: F401
from evals.report import table
from formats import hub
from formats.chat import Tokenizer, load_tokenizer
from formats.records import describe_counts, identifier, read_rows, require_languages
from formats.weights import DTYPES, adapter_base

TRANSLATED_AT_ONCE = 16     # instructions between two writes


# --------------------------------------------------------------------------------------------- reply language


# ---------------------------------------------------------------------------------------------------- answers


# -------------------------------------------------------------------------------------------------------- ask

def load_model(args) -> tuple[llama.Llama, Tokenizer, str, str]:
    """(model, tokenizer, name of the base, name of the dtype)
    that --model, --adapter, --device and --dtype ask for."""
    base = args.model or (adapter_base(args.adapter) if args.adapter else "demo/llama")
    tokenizer = load_tokenizer(base)
    dtype = args.dtype if args.dtype != "auto" else "bf16" if args.device.startswith("cuda") else "fp32"
    return llama.load(base, args.device, DTYPES[dtype], args.adapter), tokenizer, base, dtype


def ask(args) -> None:
    """Answer one question, or questions typed one at a time until an empty line. Each stands alone."""
    model, tokenizer, base, _ = load_model(args)

    def reply(question: str) -> str:
        ids = llama.generate(model, [tokenizer.prompt_ids(question, args.system_prompt)], args.max_tokens,
                             tokenizer.stop_ids, args.temperature, args.top_p, args.seed)[0]
        return tokenizer.decode(ids).strip()
    if args.question:
        print(reply(args.question))
        return
    print(f"{base}{' with ' + args.adapter if args.adapter else ''}. Ask; an empty line ends.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        print(reply(question))


# --------------------------------------------------------------------------------------- evaluation directory


def open_model(args) -> tuple[llama.Llama, Tokenizer, dict]:
    """The model that --model and --adapter name, its tokenizer,
    and the settings that stand beside its numbers."""
    model, tokenizer, base, dtype = load_model(args)
    settings = {"model": str(base), "model hash": weights_hash(hub.local(base)), "adapter": args.adapter,
                "adapter hash": args.adapter and weights_hash(Path(args.adapter)),
                "tokenizer and template": tokenizer.fingerprint[:HASH_DIGITS], "dtype": dtype,
                "device": args.device, "torch": torch.__version__}
    print(f"{base}{' with ' + args.adapter if args.adapter else ''}: {dtype} on {args.device}")
    return model, tokenizer, settings


def weights_hash(path: Path) -> str:
    """Of the contents of a checkpoint's or adapter's weight files."""
    return fingerprint(*([path] if path.is_file() else sorted(path.glob("*.safetensors"))))[:HASH_DIGITS]


def out_directory(args, *names: str) -> Path:
    """--out, or runs/eval/NAMES-MODEL: one directory for each evaluation of each model."""
    model = Path(args.adapter or args.model or "demo/llama").as_posix().strip("./").replace("/", "-")
    return Path(args.out) if args.out else Path("runs/eval") / "-".join([*filter(None, names), model])


def finish(out: Path, settings: dict, figures: dict, **details) -> None:
    """result.json: the figures and everything they depend on. `compare` reads it."""
    write_json(out / "result.json", {"figures": figures, **details, "settings": settings})
    print(f"settings and details: {out}/result.json; answers: {out}/answers.jsonl")


def with_error(value: float, error: float | None, digits: int = 2) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


# -------------------------------------------------------------------------------------------- multiple choice

def mc(args) -> None:
    """Score a multiple-choice benchmark: accuracies with their standard error,
    and every question's log-probs."""
    benchmark = choice.read_benchmark(args.benchmark, args.files, args.shots, args.lang,
                                          args.subjects and args.subjects.split(","), args.split, args.limit)
    model, tokenizer, settings = open_model(args)
    settings |= benchmark.settings
    out = out_directory(args, args.benchmark, args.lang, f"{args.shots}shot")
    part = [args.split != "test" and args.split, args.subjects, args.limit and f"first {args.limit}"]
    figure = " ".join(filter(None, [args.benchmark, args.lang, f"{args.shots}-shot", *part]))
    numbers = Counter()
    names = [f"{question.subject} {numbers.update([question.subject]) or numbers[question.subject]}"
             for question in benchmark.questions]
    keys = ("question", "correct", "choice", "cut", "scores")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        score_questions(model, tokenizer, dict(zip(names, benchmark.questions)), figure, journal,
                        args.batch_tokens)
    answers = {line["question"]: line for line in journal.done}
    summary = choice.summarise(benchmark, [answers[name] for name in names])
    total, categories = summary["all"], {f"all of {name}": part
                                         for name, part in summary["categories"].items()}
    print(table([figure, "accuracy %", "questions"],
                [[name, with_error(part["accuracy"], part["stderr"]), str(part["n"])]
                 for name, part in {**summary["subjects"], **categories, "all": total}.items()]))
    cut = tell_cut(journal)
    finish(out, settings, {figure: {"value": total["accuracy"], "stderr": total["stderr"], "n": total["n"]}},
           **summary, cut=cut)


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
    with tqdm(total=len(questions), initial=len(done), desc=figure, unit="question") as bar:
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
    """NLL of held-out responses per UTF-8 byte (the stop token's too),
    which models with other tokenizers can be compared with, and its exponential."""
    rows = require_languages(read_rows(args.data), args.source, args.lang)
    rows = [row for row in rows if row.get("split", args.split) == args.split] if args.split else rows
    choice.refuse_duplicates([(where, identifier(record, where))
                                  for where, record in read_records(args.data)])
    if not rows:
        raise InputError(f"{args.data} has no row of split {args.split!r}: see --split")
    model, tokenizer, settings = open_model(args)
    settings |= {"language": args.lang, "source": args.source, "data": args.data,
                 "data hash": choice.file_hash(args.data), "split": args.split, "rows": len(rows),
                 "system_prompt": args.system_prompt,
                 "scored": "the response and its stop token, after the prompt"}
    out = out_directory(args, "perplexity", args.lang)
    places = ((report.SOURCE, args.source), (report.TARGET, args.lang))
    keys = ("question", "place", "nll", "bytes", "tokens", "cut")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        for place, language in places:
            score_responses(model, tokenizer, rows, place, language, journal, args)
    figures, lines = {}, []
    for place, language in places:
        found = [line for line in journal.done if line["place"] == place]
        figure = ratio([line["nll"] for line in found], [line["bytes"] for line in found])
        tokens = sum(line["tokens"] for line in found)
        exponential = {"value": math.exp(figure["value"]), "n": figure["n"]}
        figures |= {f"nll/byte {place}": figure, f"perplexity/byte {place}": exponential}
        lines.append([language, with_error(figure["value"], figure["stderr"], 4),
                      f"{exponential['value']:.4f}", f"{sum(line['nll'] for line in found) / tokens:.4f}",
                      str(figure["n"])])
    print(table(["", "nll per byte", "perplexity per byte", "nll per token", "rows"], lines))
    finish(out, settings, figures, cut=tell_cut(journal))


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
    with tqdm(total=len(rows), initial=len(done), desc=f"nll {language}", unit="row") as bar:
        for order, logps in choice.sequence_logps(model, forks, args.batch_tokens, shared):
            for i, (logp,) in zip(order, logps):
                journal.add({"question": left[i]["row_id"], "place": place, "nll": -logp, "cut": parts[i].cut,
                             "bytes": len(left[i][language]["response"].encode()),
                             "tokens": len(forks[i].continuations[0])})
            bar.update(len(order))


# ------------------------------------------------------------------------------------------------- AlpacaEval

def read_instructions(path, language: str) -> list[dict]:
    """[{"instruction", "dataset"}] of a file in alpaca_eval's format,
    or of parallel rows that hold the language."""
    found = []
    for where, record in read_records(path):
        own = as_kind(record, dict, where).get(language)
        text = own["prompt"] if isinstance(own, dict) and "prompt" in own else \
            need(record, "instruction", where)
        found.append((where, check_unicode({"instruction": as_kind(text, str, where),
                                         "dataset": record.get("dataset")}, where)))
    choice.refuse_duplicates([(where, item["instruction"]) for where, item in found])
    if not found:
        raise InputError(f"{path}: the file holds no instruction")
    return [item for _, item in found]


def translate_instructions(items: list[dict], args) -> list[dict]:
    """The items in --lang. The translation is kept under a hash of what made it, so that every system gets
    the same strings, byte for byte: alpaca_eval joins answers on them."""
    translator = translate.load(args.translator, args.device)
    translator.check(args.source, [args.lang])
    settings = {"translator": translator.fingerprint, "source": args.source, "lang": args.lang,
                "beams": args.beams}
    key = fingerprint([item["instruction"] for item in items], settings)[:HASH_DIGITS]
    path = Path("runs/eval") / f"instructions-{args.lang}-{key}.jsonl"
    with Journal(path, settings, ("source", "instruction", "faults")) as journal, \
            tqdm(total=len(items), initial=len(journal.done), desc=f"translate to {args.lang}",
                 unit="instruction") as bar:
        for first in range(len(journal.done), len(items), TRANSLATED_AT_ONCE):
            texts = [item["instruction"] for item in items[first:first + TRANSLATED_AT_ONCE]]
            for text, drawn in zip(texts, translate.translate(
                    texts, args.source, args.lang, translator, args.beams)):
                journal.add({"source": text, "instruction": drawn, "faults": drawn.faults})
            bar.update(len(texts))
    print(f"translated instructions, the same for every system: {path}")
    return keep_translated(items, journal.done)


def keep_translated(items: list[dict], lines: list[dict]) -> list[dict]:
    """The items with their translations; those that failed a check, are empty or equal an earlier one are
    left out and counted."""
    kept, left_out = {}, Counter()
    for item, line in zip(items, lines):
        text = line["instruction"]
        if line["faults"]:
            left_out.update(line["faults"].keys())
        elif not text.strip() or text in kept:
            left_out["empty" if not text.strip() else "equal to an earlier one"] += 1
        else:
            kept[text] = item | {"instruction": text}
    if len(kept) < len(items):
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.most_common())
        print(f"{len(items) - len(kept)} of {len(items)} translated instructions are left out: {reasons}")
    if not kept:
        raise InputError("no translated instruction is left, for the reasons above: give instructions in the "
                         "language, without --translator")
    return list(kept.values())


def alpaca(args) -> None:
    """Answer a list of instructions; model_outputs.json is what alpaca_eval and `judge` read."""
    items = read_instructions(args.instructions, args.source if args.translator else args.lang)[:args.limit]
    if args.translator:
        items = translate_instructions(items, args)
    model, tokenizer, settings = open_model(args)
    settings |= {"language": args.lang, "instructions": args.instructions, "translator": args.translator,
                 "instructions hash": fingerprint([item["instruction"] for item in items]),
                 "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed,
                 "max_tokens": args.max_tokens, "system_prompt": args.system_prompt, "batch": args.batch_size}
    out = out_directory(args, "alpaca", args.lang)
    with Journal(out / "answers.jsonl", settings, ("instruction", "output", "tokens"), args.fresh) as journal:
        answer_instructions(model, tokenizer, items, journal, args)
    name = args.name or Path(args.adapter or args.model or "demo/llama").as_posix()
    write_json(out / "model_outputs.json", [
        {"dataset": item["dataset"], "instruction": item["instruction"], "output": line["output"],
         "generator": name, "datasplit": "eval"} for item, line in zip(items, journal.done)])
    length = sum(len(line["output"]) for line in journal.done) / len(items)
    cut = sum(line["tokens"] >= args.max_tokens for line in journal.done)
    print(f"{out}/model_outputs.json: {len(items)} answers of {length:.0f} characters on average, "
          f"{cut} of them cut at {args.max_tokens} tokens")
    finish(out, settings, {"answer characters": {"value": length, "n": len(items)}}, cut=cut)


def answer_instructions(model, tokenizer, items: list[dict], journal: Journal, args) -> None:
    """Add answers to the journal, a batch at a time. Sampling starts anew with each batch,
    so that a resumed run equals an undisturbed one."""
    with tqdm(total=len(items), initial=len(journal.done), desc="answers", unit="answer") as bar:
        for first in range(len(journal.done) // args.batch_size * args.batch_size, len(items),
                           args.batch_size):
            part = items[first:first + args.batch_size]
            prompts = [tokenizer.prompt_ids(item["instruction"], args.system_prompt) for item in part]
            replies = llama.generate(model, prompts, args.max_tokens, tokenizer.stop_ids,
                                     args.temperature, args.top_p, args.seed + first, args.batch_size)
            for item, reply in list(zip(part, replies))[len(journal.done) - first:]:
                journal.add({"instruction": item["instruction"], "output": tokenizer.decode(reply).strip(),
                             "tokens": len(reply)})
                bar.update()


def judge_outputs(args) -> None:
    """Ask the judge about every pair of answers:
    annotations.json in alpaca_eval's format, and the win rate of A."""
    pairs = judge.pair_outputs(args.outputs, args.reference)[:args.limit]
    settings = judge_settings(args, len(pairs))
    out = Path(args.out) if args.out else \
        Path(args.outputs).parent / f"against-{Path(args.reference).parent.name}"
    endpoint = judge.endpoint_from_environment(args.judge_model, max_tokens=args.judge_tokens,
                                               timeout=args.timeout, attempts=args.attempts, pause=args.pause)
    figure = f"win rate over {pairs[0]['generator_1']}"
    keys = ("question", "output_1", "output_2", "preference", "prompt_tokens", "completion_tokens")
    with Journal(out / "answers.jsonl", settings, keys, args.fresh) as journal:
        failed = ask_judge(pairs, endpoint, figure, journal, args)
    lines = {line["question"]: line for line in journal.done}
    annotations = [lines[pair["instruction"]] for pair in pairs if pair["instruction"] in lines]
    write_json(out / "annotations.json", [judge.annotation_record(line) for line in annotations])
    if failed:
        print(f"{sum(failed.values())} pairs have no verdict ({describe_counts(failed)}) and are left out; "
              f"the same command tries them again")
    rate = judge.win_rate(annotations)
    read, written = (sum(line[key] for line in annotations) for key in ("prompt_tokens", "completion_tokens"))
    cost = (read * args.price_in + written * args.price_out) / 1e6
    print(f"{pairs[0]['generator_2']} against {pairs[0]['generator_1']}: {judge.describe_rate(rate)}")
    print(f"judge: {read:,} tokens read, {written:,} written" + (f", {cost:.2f} USD" if cost else ""))
    finish(out, settings,
           {figure: {"value": rate["win_rate"], "stderr": rate["standard_error"], "n": rate["n_total"]}},
           win_rate=rate, tokens={"read": read, "written": written}, cost_usd=cost, failed=dict(failed))


def judge_settings(args, pairs: int) -> dict:
    """What a win rate depends on; of the answers too, where their own result.json lies beside them."""
    beside = Path(args.outputs).with_name("result.json")
    settings = report.load_object(beside)["settings"] if beside.is_file() else {"model": args.outputs}
    return settings | {"outputs hash": choice.file_hash(args.outputs), "reference": args.reference,
                       "reference hash": choice.file_hash(args.reference), "pairs": pairs,
                       "judge": args.judge_model, "judge prompt": judge.prompt_hash(),
                       "judge tokens": args.judge_tokens, "judge temperature": 0, "order": args.order,
                       "order seed": args.seed, "language": args.lang or settings.get("language")}


def ask_judge(pairs: list[dict], endpoint: judge.Endpoint, figure: str, journal: Journal, args) -> Counter:
    """Add the judge's verdicts to the journal; why pairs have none, counted."""
    done, failed = {line["question"] for line in journal.done}, Counter()
    left = [pair for pair in pairs if pair["instruction"] not in done]
    with tqdm(total=len(pairs), initial=len(done), desc="judged", unit="pair") as bar:
        for pair, found, fault in judge.annotate_all(left, endpoint, args.order, args.seed, args.lang,
                                                     args.parallel):
            if found:
                journal.add({"question": pair["instruction"], **found,
                             "scores": {figure: 100 * (found["preference"] - 1)}})
            else:
                failed[fault] += 1
            bar.update()
    return failed


def winrate(args) -> None:
    """The win rate that a file of annotations in alpaca_eval's format gives."""
    annotations = read_records(args.annotations)
    for where, line in annotations:
        judge.check_preference(need(line, "preference", where), where)
        for key in ("output_1", "output_2"):
            as_kind(need(line, key, where), str, where)
    rate = judge.win_rate([line for _, line in annotations])
    print(judge.describe_rate(rate))
    print(json.dumps(rate | {"annotations hash": choice.file_hash(args.annotations)}))


# ---------------------------------------------------------------------------------------------------- compare

def compare(args) -> None:
    """One table over runs and evaluations, paired differences from the baseline, and plots when asked."""
    results = report.read_results(args.runs)
    print(report.comparison(results, args.baseline))
    print(report.settings_text(args.runs))
    if args.plot:
        for path in report.plot(results, args.plot):
            print(f"plot: {path}")


# ----------------------------------------------------------------------------------------------- command line

def add_model_flags(parser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default=None, help="directory or hub id; default: the adapter's base, else demo/llama")
    add("--adapter", default=None,
        help="PEFT LoRA adapter directory, e.g. runs/sw/clo/adapter, or an attn_delta.safetensors")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", *DTYPES],
        help="compute type; auto: bf16 on CUDA, else fp32")


def add_output_flags(parser) -> None:
    add = parser.add_argument_group("files").add_argument
    add("--out", default=None,
        help="directory for answers.jsonl and result.json; default: named after what is evaluated")
    add("--fresh", action="store_true",
        help="start over instead of going on behind the answers that are there")


def add_answer_flags(parser, max_tokens: int) -> None:
    add = parser.add_argument_group("answers").add_argument
    add("--system-prompt", default=None, help="put before every question, in the checkpoint's chat template")
    add("--temperature", type=float, default=0.0, help="0 is greedy; higher is more varied")
    add("--top-p", type=float, default=1.0,
        help="sample from the likeliest tokens that hold this probability")
    add("--max-tokens", type=int, default=max_tokens, help="longest answer, in tokens")
    add("--seed", type=int, default=0, help="of the sampling")


def add_ask(sub) -> None:
    sub.add_argument("question", nargs="?", help="without it, questions are read from the terminal")
    sub.set_defaults(run=ask)
    add_answer_flags(sub, 256)
    add_model_flags(sub)


def add_mc(sub) -> None:
    sub.add_argument("benchmark", choices=list(choice.TASKS),
                     help="how files are read and questions worded")
    sub.add_argument("files", help="directory of the benchmark as distributed (csv, tsv, jsonl), "
                                   "or hub id of its data set")
    sub.add_argument("--shots", type=int, default=0,
                     help="worked examples before each question; tables mostly use 5")
    sub.add_argument("--lang", default="",
                     help="of MMMLU, BELEBELE, AfriMMLU: sw, or its own code (SW-KE, swh_Latn, swa)")
    sub.add_argument("--subjects", default=None, help="only these, joined by commas")
    sub.add_argument("--split", default="test", help="the split asked")
    sub.add_argument("--limit", type=int, default=None, help="the first so many questions of every subject")
    sub.add_argument("--batch-tokens", type=int, default=2048, help="tokens of one forward pass")
    sub.set_defaults(run=mc)
    add_model_flags(sub)
    add_output_flags(sub)


def add_perplexity(sub) -> None:
    sub.add_argument("--data", default="demo/eval.jsonl", help="held-out parallel rows")
    sub.add_argument("--lang", required=True, help="target language")
    sub.add_argument("--source", default="en", help="source language")
    sub.add_argument("--split", default="test", help='rows of this split, and rows without one; "" takes all')
    sub.add_argument("--system-prompt", default=None,
                     help="put before every question, in the checkpoint's chat template")
    sub.add_argument("--batch-tokens", type=int, default=2048, help="tokens of one forward pass")
    sub.set_defaults(run=perplexity)
    add_model_flags(sub)
    add_output_flags(sub)


def add_alpaca(sub) -> None:
    sub.add_argument("--instructions", required=True,
                     help='JSON with "instruction"s (alpaca_eval\'s format), or parallel rows')
    sub.add_argument("--lang", required=True,
                     help="language of the instructions; with --translator, translated into")
    sub.add_argument("--translator", default=None,
                     help="M2M100 or NLLB directory: translate the instructions first")
    sub.add_argument("--source", default="en", help="language translated from")
    sub.add_argument("--beams", type=int, default=5, help="beam width of the translation")
    sub.add_argument("--name", default=None,
                     help="generator's name in the output; default: the adapter or model")
    sub.add_argument("--limit", type=int, default=None, help="the first so many instructions")
    sub.add_argument("--batch-size", type=int, default=32,
                     help="answers generated at once, and saved together")
    sub.set_defaults(run=alpaca)
    add_answer_flags(sub, 1024)
    add_model_flags(sub)
    add_output_flags(sub)


def add_judge(sub) -> None:
    sub.add_argument("outputs", metavar="A.json",
                     help="answers of the system in question (model_outputs.json)")
    sub.add_argument("reference", metavar="B.json", help="answers it is compared with")
    sub.add_argument("--judge-model", default="gpt-4o", help="name the endpoint knows it by")
    sub.add_argument("--lang", default="", help="language the answers should be in, named to the judge")
    sub.add_argument("--order", default="random", choices=["random", "both"],
                     help="alpaca_eval's coin, or each pair twice")
    sub.add_argument("--seed", type=int, default=0, help="of the coin")
    sub.add_argument("--limit", type=int, default=None, help="the first so many pairs")
    sub.add_argument("--judge-tokens", type=int, default=1,
                     help="tokens the judge may write; more if it gives no log-probs")
    sub.add_argument("--price-in", type=float, default=0.0, help="USD for a million tokens read")
    sub.add_argument("--price-out", type=float, default=0.0, help="USD for a million tokens written")
    add = sub.add_argument_group("endpoint (OPENAI_BASE_URL, OPENAI_API_KEY)").add_argument
    add("--parallel", type=int, default=8, help="requests at a time")
    add("--timeout", type=float, default=60.0, help="seconds for a request")
    add("--attempts", type=int, default=6, help="requests for a pair before it is given up")
    add("--pause", type=float, default=1.0, help="seconds before the second attempt; doubles with each")
    sub.set_defaults(run=judge_outputs)
    add_output_flags(sub)


def add_winrate(sub) -> None:
    sub.add_argument("annotations", metavar="annotations.json", help="in alpaca_eval's format")
    sub.set_defaults(run=winrate)


def add_compare(sub) -> None:
    sub.add_argument("runs", nargs="+", metavar="RUN",
                     help="run directories of clo.py; directories of mc, perplexity, judge")
    sub.add_argument("--baseline", default="sft",
                     help="method the others are compared with, question by question")
    sub.add_argument("--plot", default=None, metavar="DIR",
                     help="draw learning curves and the trade-off into this directory")
    sub.set_defaults(run=compare)


COMMANDS = {"ask": (add_ask, "one answer, or a small terminal conversation"),
            "mc": (add_mc, "multiple choice: MMLU, MMMLU, CMMLU, BELEBELE, AfriMMLU"),
            "perplexity": (add_perplexity, "NLL of held-out responses per byte, in both languages"),
            "alpaca": (add_alpaca, "answers to a list of instructions, in alpaca_eval's format"),
            "judge": (add_judge, "win rate by a judge behind an OpenAI-compatible endpoint"),
            "winrate": (add_winrate, "win rate of a finished file of annotations"),
            "compare": (add_compare, "one table over many runs, with plots")}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.py",
                                     description="Look at what a model answers, and measure it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, text) in COMMANDS.items():
        add(commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    args = parser.parse_args(argv)
    for name in ("limit", "batch_tokens", "batch_size", "beams", "max_tokens",
                 "judge_tokens", "parallel", "attempts"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 was expected")
    if getattr(args, "shots", 0) < 0:
        parser.error(f"--shots {args.shots}: 0 or more was expected")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    if "device" in args:
        args.device = ranks.pick_device(args.device)
    args.run(args)


if __name__ == "__main__":
    run(main)
