"""Targets, links, and the cost of compiled texts; what is made of them: test_plans.

The texts in `compiled/` are what libtpu 0.0.42.1 made of two small functions for
v5e:2x2, without most of their backend_config: products in two nested loops whose
weights are gathered, and a product beside an all-gather that ends in a reduce-scatter.
"""

import dataclasses
import itertools
import re
from pathlib import Path

import jax
import pytest

from rae_jax.planning import compile as compiling
from rae_jax.planning import costs, counting, hlo, links, targets

ROOT = Path(__file__).parent.parent


def sample(name):
    return (Path(__file__).parent / "compiled" / f"{name}.txt").read_text()


def wires(text):
    """The links of a target whose mesh is in the order of its coordinates."""
    target = targets.parse(text)
    places = itertools.product(*map(range, target.shape))
    slices = range(target.slices)
    order = [(s, p) for s, p in itertools.product(slices, list(places))]
    return links.Links(target, order)


# ---- Targets


@pytest.mark.parametrize(
    ("text", "chips", "devices", "slices"),
    [
        ("v5p:4x4x4", 64, 64, 1),
        ("v6e:4x4", 16, 16, 1),
        ("v5e:16x16*2", 512, 512, 2),
        ("v4:2x2", 4, 4, 1),
        ("v3:4x4", 16, 32, 1),
        ("h100:8", 8, 8, 1),
        ("h100:1", 1, 1, 1),
        ("h200:32", 32, 32, 4),
    ],
)
def test_targets_count_chips(text, chips, devices, slices):
    target = targets.parse(text)
    assert (target.chips, target.devices, target.slices) == (chips, devices, slices)
    assert target.peak_flops == chips * target.chip.peak_flops


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v6p:4x4", "Did you mean 'v5p'|Did you mean 'v6e'"),
        ("v5p", "names no topology.*v5p:4x4x4.*h100:8"),
        ("v6e-16", "Unknown target.*v6e:4x4"),
        ("v5p:64", "chips along each axis"),
        ("v6e:4x4x4", "has 2 axes"),
        ("h100:12", "multiple of 8"),
        ("h100:2x8", "number of GPUs alone, h100:16"),
        ("v5e:0x2", "no chips"),
    ],
)
def test_unknown_targets_are_explained(text, said):
    with pytest.raises(ValueError, match=said):
        targets.parse(text)


def test_a_gpu_is_described_by_its_own_figures():
    text = targets.gpu_description(targets.CHIPS["h200"])
    assert "memory_bandwidth: 4800000000000" in text
    assert text.count("{") == text.count("}") == 3


def test_the_launch_scripts_set_the_same_options():
    text = (ROOT / "launch" / "env.sh").read_text()
    for platform, name in (("tpu", "RAE_TPU_FLAGS"), ("cuda", "RAE_GPU_FLAGS")):
        lines = re.findall(rf'^{name}\+?="(.*)"', text, re.M)
        flags = dict(f.removeprefix("--").split("=") for f in " ".join(lines).split())
        given = {k: str(v).lower() for k, v in compiling.OPTIONS[platform].items()}
        assert given == flags
    assert f"MEM_FRACTION:-{targets.GPU_MEMORY_SHARE}}}" in text


# ---- Compiled texts


def test_loops_are_multiplied_out():
    cost = costs.count(sample("nested_loops"), wires("v5e:2x2"))
    cycles = 3 * (2027 + 5 * (2450 + 2098))
    assert cost.seconds * 1.5e9 == pytest.approx(cycles)
    assert cost.flops == 3 * 5 * 2 * 128 * 256 * 256
    # Three gathers of 256 x 256 in bfloat16, each over the one axis of the group.
    gathered = 3 * 256 * 256 * 2
    assert cost.collective_bytes == {"all-gather": gathered}
    assert cost.exposed == cost.network
    assert cost.network == pytest.approx(0.75 * gathered / (2 * 45e9))


def test_time_is_found_by_source_line():
    cost = costs.count(sample("nested_loops"), wires("v5e:2x2"))
    (line, share), *_ = costs.top_lines(cost, 2)
    assert line == "layers/example.py:10 product"
    assert share == pytest.approx(15 * 2450 / (cost.seconds * 1.5e9))
    assert sum(cost.lines.values()) == pytest.approx(cost.seconds)


def test_helpers_give_way_to_their_callers():
    text = sample("nested_loops").replace("layers/example.py", "layers/linear.py")
    program = hlo.parse(text)
    names = {program.source(i) for body in program.computations.values() for i in body}
    assert "layers/linear.py:10 product" in names  # Nothing else is on its stack.
    files = text.replace('1 "/src', '1 "/src/rae_jax/models/dit.py"\n2 "/src')
    inner = re.sub(r"file_name_id=1 (function_name_id=5)", r"file_name_id=2 \1", files)
    names = {
        program.source(i)
        for program in [hlo.parse(inner)]
        for body in program.computations.values()
        for i in body
    }
    assert "models/dit.py:14 f.<locals>.outer.<locals>.inner" in names


def test_a_gather_hides_behind_the_product_beside_it():
    cost = costs.count(sample("async_gather"), wires("v5e:2x2"))
    whole = 512 * 512 * 2
    assert cost.collective_bytes == {"all-gather": whole, "reduce-scatter": whole}
    once = 0.75 * whole / 90e9
    assert cost.network == pytest.approx(2 * once)
    assert cost.exposed == pytest.approx(once)  # The other ran beside 6236 cycles.
    assert cost.flops == 3 * 2 * 512**3


def test_a_gather_that_takes_longer_than_the_product_shows():
    slow = wires("v5e:2x2")
    chip = dataclasses.replace(slow.target.chip, link_bandwidth=180e6)
    slow = dataclasses.replace(slow, target=dataclasses.replace(slow.target, chip=chip))
    cost = costs.count(sample("async_gather"), slow)
    assert cost.network > cost.exposed > 0.99 * cost.network


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


GPU_TEXT = """HloModule jit_f

%body (p: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %p = (s32[], bf16[1024,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[1024,1024]{1,0} get-tuple-element(%p), index=1
  %mm = (bf16[1024,1024]{1,0}, s8[4194304]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %y = bf16[1024,1024]{1,0} get-tuple-element(%mm), index=0
  ROOT %t = (s32[], bf16[1024,1024]{1,0}) tuple(%i, %y)
}

%condition (p.1: (s32[], bf16[1024,1024])) -> pred[] {
  %p.1 = (s32[], bf16[1024,1024]{1,0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

%slice_one (p.2: f32[64,1024,1024], p.3: s32[]) -> f32[1,1024,1024] {
  %p.2 = f32[64,1024,1024]{2,1,0} parameter(0)
  %p.3 = s32[] parameter(1)
  ROOT %d = f32[1,1024,1024]{2,1,0} dynamic-slice(%p.2, %p.3, %p.3, %p.3)
}

ENTRY %main (a: bf16[1024,1024], b: f32[64,1024,1024], k: s32[]) -> bf16[1024,1024] {
  %a = bf16[1024,1024]{1,0} parameter(0)
  %b = f32[64,1024,1024]{2,1,0} parameter(1)
  %k = s32[] parameter(2)
  %one = f32[1,1024,1024]{2,1,0} fusion(%b, %k), kind=kLoop, calls=%slice_one
  %init = (s32[], bf16[1024,1024]{1,0}) tuple(%k, %a)
  %w = (s32[], bf16[1024,1024]{1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %r = bf16[1024,1024]{1,0} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def test_a_gpu_program_is_timed_by_its_roofline():
    cost = costs.count(GPU_TEXT, wires("h100:8"))
    product, sliced = 2 * 1024**3, 2 * 4 * 2**20 + 4
    assert cost.flops == 7 * product
    # Of 64 rows one is read and written; the workspace of a product is not.
    assert cost.hbm_bytes == 7 * 3 * 2 * 2**20 + sliced
    bound = 7 * max(product / 989e12, 3 * 2 * 2**20 / 3352e9) + sliced / 3352e9
    assert cost.seconds == pytest.approx(bound)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_count_what_multiplies_data(stride):
    def f(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=dims
        )

    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((2, 8, 8, 3), (3, 3, 3, 5))]
    text = jax.jit(f).lower(*shapes).compile().as_text()
    program = hlo.parse(text)
    found = sum(
        counting.flops(program, name, i)
        for name, body in program.computations.items()
        for i in body
        if i.opcode == "convolution"
    )
    pairs = {1: 3 * 8 - 2, 2: 3 * 4 - 1}[stride]
    assert found == 2 * 2 * 3 * 5 * pairs**2


# ---- Links


@pytest.mark.parametrize(
    ("attributes", "members"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}, x", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}, x", [0, 1, 2, 3]),
        ("replica_groups={}, x", list(range(8))),
    ],
)
def test_groups_are_read_in_every_notation(attributes, members):
    assert links.group(attributes, 8) == members


def test_a_group_uses_the_links_of_the_axes_that_it_spans():
    pod = wires("v5p:4x4x4")
    line, plane, whole = list(range(4)), list(range(16)), list(range(64))
    assert [pod.bandwidth(g) / 180e9 for g in (line, plane, whole)] == [1, 2, 3]
    small = wires("v6e:4x4")  # Its axes are lines: no link joins their ends.
    assert small.bandwidth(list(range(16))) == 180e9
    nodes = wires("h100:16")
    assert nodes.bandwidth(list(range(8))) == 450e9
    assert nodes.bandwidth([0, 8]) == 50e9
    assert nodes.bandwidth(list(range(16))) == 400e9


def test_an_all_reduce_sends_twice_what_a_gather_does():
    pod, groups = wires("v5p:4x4x4"), "replica_groups=[1,64]<=[64]"
    gather = pod.seconds("all-gather", 1e9, groups)
    assert pod.seconds("all-reduce", 1e9, groups) == 2 * gather
    assert gather == pytest.approx(63 / 64 / 540)
    assert pod.seconds("all-reduce", 1e9, "replica_groups={{0}}") == 0
