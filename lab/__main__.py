"""python -m lab PLAN runs what is missing of a plan; python -m lab report draws docs/replication*.md
and README's table."""

import os
import signal
import sys
from pathlib import Path

from engine import flags
from engine.files import run
from lab import report, runner
from lab.plan import read_plan, ready

LOWEST_PRIORITY = 19


def parse_args(argv=None):
    parser = flags.Parser(prog="python -m lab", description=__doc__)
    add = parser.add_argument
    add("plan", help="a JSON file, or the name of one in lab/plans/; or the word report")
    add("--runs", type=Path, default=Path("runs/lab"), help="where run directories and logs go")
    add("--results", type=Path, default=runner.RESULTS, help="where the lines go, one file for each plan")
    add("--list", action="store_true", help="name what is missing and can begin; run nothing")
    add("--out", type=Path, default=report.DOCS, help="report: where the page and its plots go; README's too, if neither this nor --results is given")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.plan == "report":
        lines = report.read_all(args.results)
        report.write(lines, args.out)
        own = args.results.resolve() == runner.RESULTS.resolve() and args.out.resolve() == report.DOCS.resolve()
        if own:
            report.write_readme(lines)
        return
    plan = read_plan(args.plan)
    results = args.results / f"{plan['name']}.jsonl"
    if args.list:
        for missing in ready(plan, runner.read_results(results)):
            print(missing.name)
        return
    os.nice(LOWEST_PRIORITY)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C: a run is not left alone
    failed = runner.work(plan, args.runs, results)
    if failed:
        sys.exit(f"{len(failed)} runs failed; the same command tries them again")


if __name__ == "__main__":
    run(main)
