"""kernels/interface.py says the same as csrc/fastddpm.h."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastddpm.kernels import interface

HEADER = Path(__file__).parents[2] / "csrc" / "fastddpm.h"
STRUCTURES = {
    "fastddpm_key": interface.Key,
    "fastddpm_random_normal_args": interface.RandomNormal,
    "fastddpm_group_norm_silu_args": interface.GroupNormSiLU,
    "fastddpm_attention_args": interface.Attention,
    "fastddpm_q_sample_args": interface.QSample,
    "fastddpm_reverse_step_args": interface.ReverseStep,
    "fastddpm_conv_args": interface.Conv,
    "fastddpm_norm_affine_args": interface.NormAffine,
    "fastddpm_resample_args": interface.Resample,
    "fastddpm_digest_args": interface.Digest,
    "fastddpm_crc32c_args": interface.Crc32c,
}


def test_no_structure_is_left_out() -> None:
    assert set(re.findall(r"^\} (\w+);", HEADER.read_text(), re.MULTILINE)) == set(STRUCTURES)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler; there is none")
def test_every_field_lies_where_c_puts_it(tmp_path: Path) -> None:
    """Also that the header is plain C."""
    lines = [f'printf("{name} %zu\\n", sizeof({name}));' for name in STRUCTURES]
    for name, structure in STRUCTURES.items():
        for field in structure._fields_:
            member = f"(({name} *)0)->{field[0]}"
            lines.append(f'printf("{name}.{field[0]} %zu %zu\\n", offsetof({name}, {field[0]}), sizeof({member}));')
    source = tmp_path / "layout.c"
    body = "\n".join(lines)
    source.write_text(f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{\n{body}\n}}\n')
    program = tmp_path / "layout"
    subprocess.run(["cc", "-std=c99", "-Wall", "-Werror", "-pedantic", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    ours = [f"{name} {ctypes.sizeof(structure)}" for name, structure in STRUCTURES.items()]
    for name, structure in STRUCTURES.items():
        for field in structure._fields_:
            place = getattr(structure, field[0])
            ours.append(f"{name}.{field[0]} {place.offset} {place.size}")
    assert ours == printed
