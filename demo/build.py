"""Builds the demo from the world's files: the data, the base model and the translator, from one seed.

    python -m demo.build                         # needs demo/requirements.txt; writes into demo/
    python -m demo.build --tiny --out /tmp/demo  # the same in seconds, with models that know next to nothing

Everything is made in OUT/.build and moved to OUT when all of it is finished. A build that was killed and is
started again with the same world and settings keeps each part of a model's training that had ended.
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import model as llama
import translate
from demo import render, train_llama, train_translator
from demo.render import LANGUAGES, World
from demo.training import Schedule
from engine.files import InputError, run
from formats.chat import load_tokenizer
from formats import configs
from formats.records import read_rows, write_rows
from m2m100 import network

HERE = Path(__file__).parent
PRODUCTS = ("llama", "m2m100", "english.jsonl", "eval.jsonl")
BEAMS = 5
MAX_TOKENS = 64  # of a reply; the longest right one is a third of that


@dataclass(frozen=True)
class Size:
    """What distinguishes the real build from the tiny one. The translator's schedule counts target tokens."""

    relations: int | None  # the first of the world's relations; None: all
    llama_vocab: int
    translator_vocab: int
    width: int
    layers: int
    llama: tuple[Schedule, ...]  # one part of the training after another
    translator: tuple[Schedule, ...]
    measured: int | None  # facts of each held-out split to measure on; None: all
    side_by_side: bool  # train in two processes of one thread; tiny trainings end before a process starts


FULL = Size(relations=None, llama_vocab=6144, translator_vocab=8192, width=128, layers=4,
            llama=(Schedule(6000, 1024, 3e-3), Schedule(3000, 1024, 2e-3)),
            translator=(Schedule(6000, 1024, 3e-3), Schedule(3600, 1024, 2e-3)),
            measured=None, side_by_side=True)
TINY = Size(relations=4, llama_vocab=700, translator_vocab=700, width=32, layers=1,
            llama=(Schedule(6, 512, 3e-3), Schedule(4, 512, 3e-3)),
            translator=(Schedule(6, 512, 3e-3), Schedule(4, 512, 3e-3)), measured=2, side_by_side=False)


def first_relations(world: World, count: int | None) -> World:
    """The world cut down to its first relations and the entities of their facts."""
    relations = dict(list(world.relations.items())[:count])
    facts = [fact for fact in world.facts if fact.relation in relations]
    used = {key for fact in facts for key in (fact.subject, fact.object)}
    return World(relations, {key: texts for key, texts in world.entities.items() if key in used}, facts)


def llama_config(size: Size, vocab_size: int) -> configs.Config:
    return configs.Config(
        vocab_size=vocab_size, hidden_size=size.width, intermediate_size=size.width * 43 // 16,  # 8/3, about
        num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=size.width // 4,
        rms_norm_eps=1e-5, max_position_embeddings=1024, tie_word_embeddings=True)


def translator_config(size: Size, vocab_size: int) -> network.Config:
    return network.Config(
        d_model=size.width, encoder_layers=max(1, size.layers - 1), decoder_layers=max(1, size.layers - 2),
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=4 * size.width,
        decoder_ffn_dim=4 * size.width, vocab_size=vocab_size, clo_languages=list(train_translator.TARGETS))


# ---- stages

def start_work(out: Path, world: World, size: Size, seed: int) -> Path:
    """The folder to work in: what a killed build with the same world and settings left, else an empty one."""
    work = out / ".build"
    world_text = json.dumps([world.relations, world.entities, [asdict(fact) for fact in world.facts]])
    world_hash = hashlib.sha256(world_text.encode()).hexdigest()
    settings = json.dumps({"world": world_hash, "size": asdict(size), "seed": seed})
    note = work / "settings.json"
    if work.exists() and not (note.exists() and note.read_text() == settings):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(settings)
    return work


def train_base(work: Path, size: Size, seed: int, line: int) -> None:
    """Runs in a process of its own, so it reads the world again instead of getting it."""
    world, splits = world_and_splits(size, seed)
    directory = work / "llama"
    if (directory / "model.safetensors").exists():  # written last
        return
    if not (directory / "tokenizer.json").exists():
        train_llama.train_tokenizer(world, size.llama_vocab, directory)
    config = llama_config(size, load_tokenizer(directory).vocab_size)
    train_llama.train(world, splits["train"], config, size.llama, seed, directory, line)


def train_m2m100(work: Path, size: Size, seed: int, line: int) -> None:
    world, splits = world_and_splits(size, seed)
    directory = work / "m2m100"
    if (directory / "model.safetensors").exists():
        return
    if not (directory / "vocab.json").exists():
        train_translator.train_tokenizer(world, size.translator_vocab, directory)
    config = translator_config(size, train_translator.vocab_size(directory))
    train_translator.train(world, splits["train"], config, size.translator, seed, directory, line)


def world_and_splits(size: Size, seed: int) -> tuple[World, dict]:
    world = first_relations(render.read_world(), size.relations)
    return world, render.split_facts(world, seed)


def one_thread(job: Callable) -> None:
    torch.set_num_threads(1)
    run(job)


def run_jobs(jobs: list[Callable], side_by_side: bool) -> None:
    """All jobs, each in a process of its own if asked. Raises InputError when one failed (it said why)."""
    if not side_by_side:
        for job in jobs:
            job()
        return
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=one_thread, args=(job,)) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise InputError("a training process failed, see above; start the build again to go on")


# ---- measuring

def measure_base(directory: Path, rows: list[dict], world: World) -> dict[str, dict[str, float]]:
    """Per language of the question, in %: answers in English, right in English, right in its language."""
    tokenizer, model = load_tokenizer(directory), llama.load(directory)
    english = [render.statement_pattern(world, relation, "en") for relation in world.relations]
    result = {}
    for lang in tqdm(LANGUAGES, desc="base answers"):
        prompts = [tokenizer.prompt_ids(row[lang]["prompt"]) for row in rows]
        ids = llama.generate(model, prompts, MAX_TOKENS, tokenizer.stop_ids)
        replies = [tokenizer.decode(reply) for reply in ids]
        result[lang] = {
            "in English": percent(any(pattern.fullmatch(reply) for pattern in english) for reply in replies),
            "right in English": percent(reply == row["en"]["response"] for reply, row in zip(replies, rows)),
            "right in its language": percent(
                reply == row[lang]["response"] for reply, row in zip(replies, rows))}
    return result


def measure_translator(directory: Path, rows: list[dict]) -> dict[str, dict[str, float]]:
    """Per target language, in %: questions and answers translated exactly as the world has them."""
    translator = translate.load(directory)
    result = {}
    for lang in tqdm(train_translator.TARGETS, desc="translations"):
        result[lang] = {}
        for part in ("prompt", "response"):
            source = [row["en"][part] for row in rows]
            found = translate.translate(source, "en", lang, translator, beams=BEAMS)
            result[lang][part] = percent(text == row[lang][part] for text, row in zip(found, rows))
    return result


def percent(truths) -> float:
    truths = list(truths)
    return 100 * sum(truths) / len(truths)


def table(title: str, result: dict[str, dict[str, float]]) -> str:
    """Markdown: a line per measure, a column per language."""
    measures = next(iter(result.values()))
    lines = [f"| {title} | " + " | ".join(result) + " |", "|---" * (len(result) + 1) + "|"]
    lines += [f"| {measure} | " + " | ".join(f"{values[measure]:.1f}" for values in result.values()) + " |"
              for measure in measures]
    return "\n".join(lines)


def report(work: Path, world: World, size: Size) -> str:
    rows = read_rows(work / "eval.jsonl")
    parts = []
    for split in ("validation", "test"):
        held_out = [row for row in rows if row["split"] == split][:size.measured]
        heading = f"{split}, n = {len(held_out)}"
        parts += [table(f"base, % ({heading})", measure_base(work / "llama", held_out, world)),
                  table(f"translator, % exact ({heading})", measure_translator(work / "m2m100", held_out))]
    return "\n\n".join(parts)


def move_products(work: Path, out: Path) -> None:
    for name in PRODUCTS:
        old = out / name
        if old.is_dir():
            shutil.rmtree(old)
        (work / name).replace(old)
    shutil.rmtree(work)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.build", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="directory for the data and the two models")
    parser.add_argument("--seed", type=int, default=0, help="seed of splits, weights and training order")
    parser.add_argument("--tiny", action="store_true", help="few relations, models that know nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    size = TINY if args.tiny else FULL
    world, splits = world_and_splits(size, args.seed)
    counts = ", ".join(f"{split} {len(facts)}" for split, facts in splits.items())
    print(f"world: {len(world.facts)} facts; {counts}")
    work = start_work(args.out, world, size, args.seed)
    write_rows(work / "english.jsonl", render.training_rows(world, splits))
    write_rows(work / "eval.jsonl", render.evaluation_rows(world, splits))
    run_jobs([partial(train_base, work, size, args.seed, 0), partial(train_m2m100, work, size, args.seed, 1)],
             size.side_by_side)
    print(report(work, world, size))
    move_products(work, args.out)
    print(f"\nwrote {', '.join(PRODUCTS)} in {args.out}")


if __name__ == "__main__":
    run(main)
