"""What the parts of a model write sums to its residual stream, and what reads it stands behind what writes it."""

import pytest
import tiny
import torch
import zoo

from mechvlm.edge_paths import Heads
from mechvlm.nodes import Node, feeds, readers, writers
from mechvlm.plan import key_of
from mechvlm.writes import write_sites, writing, written


@zoo.second_environment
@pytest.mark.parametrize("name", zoo.VARIANTS)
def test_what_parts_write_sums_to_the_stream_that_is_unembedded(name: str) -> None:
    if zoo.there(name):
        pytest.skip(zoo.there(name))
    vlm = zoo.build(name, "eager" if name in zoo.EAGER_ONLY else "sdpa", torch.float64)
    prompt = zoo.ask(vlm, tiny.picture(width=48, height=48))
    last = f"text.{vlm.shape.layers['text'] - 1}.resid_post"
    run = vlm.run(prompt, read=[*write_sites(vlm), last])
    read = {key_of(site): run[site] for site in run.values}
    parts = written(vlm.model, writing(vlm), read, prompt.image)
    assert set(parts) == {*writers(vlm.shape), "bias"}
    torch.testing.assert_close(sum(parts.values()), run[last][0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gemma3", "mllama"])
def test_half_precision_is_rounding_and_no_more_where_heads_cancel_before_a_norm_or_a_gate(name: str) -> None:
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        vlm = zoo.build(name, "sdpa", dtype)
        prompt = zoo.ask(vlm, tiny.picture(width=48, height=48))
        run = vlm.run(prompt, read=write_sites(vlm))
        read = {key_of(site): run[site] for site in run.values}
        found.append(written(vlm.model, writing(vlm), read, prompt.image))
    exact, rounded = found
    for writer in [one for one in exact if ".h" in one]:
        assert (rounded[writer] - exact[writer]).abs().max() < 0.1 * exact[writer].abs().max()


def test_every_name_of_a_node_is_read_as_it_is_written() -> None:
    shape = zoo.build("llava_next-mistral").shape
    for name in (*writers(shape), *readers(shape)):
        assert Node.parse(name).name == name


def test_a_reader_is_fed_by_what_stands_before_it_only() -> None:
    shape = zoo.build("llava_next-mistral").shape
    order = {"a": 0, "m": 1, "d": 2}
    for writer in writers(shape):
        for reader in readers(shape):
            first, then = Node.parse(writer), Node.parse(reader)
            place = (-1, 0) if first.layer is None else (first.layer, order[writer[0]])
            there = (99, 0) if then.layer is None else (then.layer, order[reader[0]])
            assert feeds(shape, writer, reader) == (place < there)


def test_attention_and_mlp_that_read_one_stream_do_not_feed_each_other() -> None:
    shape = zoo.build("aya_vision").shape
    assert not feeds(shape, "a0.h0", "m0")
    assert feeds(shape, "a0.h0", "m1")


def test_a_key_value_head_is_part_of_all_heads_of_its_group() -> None:
    shape = zoo.build("llava_next-mistral").shape
    group = shape.heads["text"] // shape.kv_heads["text"]
    assert group > 1
    within = Heads(shape.heads["text"], shape.kv_heads["text"])
    assert within.written("a1.kv1<v>") == tuple(f"a1.h{head}" for head in range(group, 2 * group))
