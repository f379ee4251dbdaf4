"""engine/flags.py: numbers of the command line are checked at the boundary, in one line."""

import argparse
import math

import pytest

from engine import flags


@pytest.mark.parametrize("kind, fine, bad", [
    (flags.positive_int, ["1", "2147483647"], ["0", "-3", "1.5", "2147483648", "nan", "", "9" * 5000]),
    (flags.count, ["0", "7"], ["-1", "inf", "1e3", "x"]),
    (flags.seed, ["0", str(2 ** 63 - 1)], ["-1", str(2 ** 63), "nan"]),
    (flags.positive, ["1e-9", "3"], ["0", "-0.0", "nan", "inf", "1e999", "two"]),
    (flags.positives, ["1e-9", "3"], ["0", "", ",", "1,", "1,0", "1,nan", "1;2"]),
    (flags.not_negative, ["0", "2.5"], ["-1e-9", "nan", "inf"]),
    (flags.fraction, ["0", "1", "0.5"], ["-0.1", "1.0001", "nan"]),
    (flags.share, ["1", "0.000001"], ["0", "1e-320", "1.1", "nan", "-1"]),
    (flags.temperature, ["0", "0.001", "2"], ["-1", "1e-40", "nan", "inf"])])
def test_numbers_out_of_range_are_refused_in_one_line_with_what_was_expected(kind, fine, bad, capsys):
    parser = flags.Parser(prog="it")
    parser.add_argument("--x", type=kind, help="a number")
    for text in fine:
        assert parser.parse_args(["--x", text]).x == pytest.approx(float(text))
        assert math.isfinite(parser.parse_args(["--x", text]).x)
    for text in bad:
        with pytest.raises(SystemExit) as ended:
            parser.parse_args([f"--x={text}"])
        told = capsys.readouterr().err
        assert ended.value.code == 2 and told.count("\n") == 1 and len(told) < 200
        assert told.startswith("error: argument --x: ") and "was expected" in told and "it --help" in told


def test_a_single_number_stays_a_number_and_several_are_read_back():
    assert flags.positives("1e-4") == 1e-4 and flags.numbers(1e-4) == [1e-4]
    assert flags.numbers(flags.positives("3e-3, 1e-5")) == [3e-3, 1e-5]
    assert flags.numbers(None) == []


def test_a_directory_to_write_is_refused_where_a_file_is(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert flags.directory(str(tmp_path)) == tmp_path and flags.directory("not/there").name == "there"
    with pytest.raises(argparse.ArgumentTypeError, match="a directory was expected"):
        flags.directory("")
    for path in (file, file / "below", "/dev/null"):
        with pytest.raises(argparse.ArgumentTypeError, match="is a file, a directory was expected"):
            flags.directory(str(path))


def test_help_is_one_line_a_flag_without_empty_defaults_and_keeps_the_example(capsys):
    parser = flags.Parser(prog="it", epilog="Example:\n  it --seed 3")
    parser.add_argument("--seed", type=flags.seed, default=7, help="of the sampling")
    parser.add_argument("--name", default=None, help="of the thing")
    parser.add_argument("--fresh", action="store_true", help="start over")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    told = capsys.readouterr().out
    assert "of the sampling (default: 7)\n" in told and "of the thing\n" in told and "start over\n" in told
    assert "None" not in told and "False" not in told and "Example:\n  it --seed 3" in told
