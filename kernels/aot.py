"""Compile the row kernel for GPUs that are not here, and tell what each binary uses: `python -m kernels.aot`.

A Triton kernel is compiled from the types of its arguments, so no GPU is needed: only its compiler, which
Triton brings along. What the compiled code tells without running it:

    registers  for each thread. An SM has 65,536: at 32 a thread, all of its 2,048 threads fit at once.
    spills     bytes (AMD: registers) that did not fit and go to memory and back; one is a failure.
    shared     bytes of on-chip memory for one program, for the reductions across its warps.

Exit code 0 when every dtype of q compiles without a spill, else 1. Needs a process without
TRITON_INTERPRET=1, which replaces the compiler by the interpreter. `--asm DIR` writes PTX and AMD assembly
for reading.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .rows import BLOCK_V, WARPS, row_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300X
}
Q_TYPES = ("fp32", "bf16", "fp16")  # with and without gradient it is one binary
VOCABULARY = 128256  # Llama 3
ALIGNED = [["tt.divisibility", 16]]  # what the launcher finds for torch's memory and this vocabulary


def compile_row_kernel(target, q_type):
    """Compiled row kernel for a GPUTarget, with q of a Triton type; raises whatever the compiler raises."""
    outputs = ("target_logit_ptr", "most_ptr", "total_ptr", "norm_ptr")
    aligned = {"logits_ptr": "*fp32", "targets_ptr": "*i64", **dict.fromkeys(outputs, "*fp32"),
               "q_ptr": "*" + q_type, "stride_logits": "i32", "stride_q": "i32"}
    constants = {"N_WORDS": VOCABULARY, "BLOCK_V": BLOCK_V}
    signature = aligned | {"keep_q": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(row_kernel, signature, constants, {(i,): ALIGNED for i in range(len(aligned))})
    return triton.compile(source, target=target, options={"num_warps": WARPS})


def nvidia_usage(cubin):
    """(registers, spilled bytes) of a cubin, from the `cuobjdump` inside Triton's package."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def amd_usage(assembly):
    """(vector registers, spilled registers) from the notes at the end of AMD assembly."""
    notes = re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", assembly)
    used = {name: int(count) for name, count in notes}
    spills = used["vgpr_spill_count"] + used["sgpr_spill_count"] + used["private_segment_fixed_size"]
    return used["vgpr_count"], spills


def usage(compiled):
    """(registers, spills, shared bytes) of a compiled kernel."""
    nvidia = "cubin" in compiled.asm
    registers, spills = nvidia_usage(compiled.asm["cubin"]) if nvidia else amd_usage(compiled.asm["amdgcn"])
    return registers, spills, compiled.metadata.shared


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--asm", metavar="DIR", type=Path, help="write the assembly of each into DIR")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("error: TRITON_INTERPRET=1 is set, which turns the compiler off: unset it", file=sys.stderr)
        return 2
    print(f"triton {triton.__version__}, BLOCK_V {BLOCK_V}, {WARPS} warps")
    print(f"{'target':8} {'q':5} {'registers':>9} {'spills':>7} {'shared':>7}")
    spilled = 0
    for name, target in TARGETS.items():
        for q_type in Q_TYPES:
            compiled = compile_row_kernel(target, q_type)
            registers, spills, shared = usage(compiled)
            spilled += spills
            print(f"{name:8} {q_type:5} {registers:9} {spills:7} {shared:7}")
            if args.asm:
                args.asm.mkdir(parents=True, exist_ok=True)
                kind = "ptx" if "ptx" in compiled.asm else "amdgcn"
                (args.asm / f"{name}-{q_type}.{kind}").write_text(compiled.asm[kind])
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
