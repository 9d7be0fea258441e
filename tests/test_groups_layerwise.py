"""Layerwise rates: one depth for the groups and for the policy."""

import copy
import math
import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn

from selective_optim import SGD, AdamW
from selective_optim.groups import layerwise_groups
from selective_optim.policies import exclude, is_bias, layerwise


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))


class Stage(nn.Module):
    def __init__(self, before, width, depth):
        super().__init__()
        self.downsample = nn.Linear(before, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))


class RouteLayer(nn.Module):
    """A block whose parameters are mostly in a list of blocks of its own."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([Block(), Block()])


class Model(nn.Module):
    """A model of named parts, in the order given."""

    def __init__(self, **parts):
        super().__init__()
        self.token = nn.Parameter(torch.ones(4))
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def vit(depth=3):
    blocks = nn.Sequential(*(Block() for _ in range(depth)))
    return Model(
        stem=nn.Linear(3, 4), blocks=blocks, norm=nn.LayerNorm(4), head=nn.Linear(4, 2)
    )


def pairs():
    """Layers as vit_pytorch and others write them."""

    def layer():
        attention = Model(norm=nn.LayerNorm(4), qkv=nn.Linear(4, 4))
        return nn.ModuleList([attention, Block()])

    layers = nn.ModuleList(layer() for _ in range(3))
    body = Model(norm=nn.LayerNorm(4), layers=layers)
    del body.token
    return Model(stem=nn.Linear(3, 4), body=body, head=nn.Linear(4, 2))


def upside_down():
    """litgpt registers its head first, xlstm its embeddings last."""
    return Model(
        lm_head=nn.Linear(4, 9),
        blocks=nn.ModuleList([Block(), Block()]),
        ln_f=nn.LayerNorm(4),
        wte=nn.Embedding(9, 4),
        embedding_projection=nn.Linear(4, 4),
        embedding_norm=nn.LayerNorm(4),
        decoder=Model(queries=nn.Embedding(3, 4)),
    )


def swin():
    stages = nn.Sequential(Stage(3, 4, 2), Stage(4, 8, 1), Stage(8, 12, 2))
    return Model(stem=nn.Linear(3, 3), layers=stages, head=nn.Linear(12, 2))


def resnet():
    stages = {
        f"layer{i}": nn.Sequential(Block(4 * i), Block(4 * i)) for i in range(1, 4)
    }
    return Model(conv1=nn.Linear(3, 4), **stages, fc=nn.Linear(12, 2))


def gpt(tied=True):
    inner = Model(
        wte=nn.Embedding(9, 4),
        h=nn.ModuleList([Block(), Block()]),
        ln_f=nn.LayerNorm(4),
    )
    model = Model(transformer=inner, lm_head=nn.Linear(4, 9, bias=False))
    if tied:
        model.lm_head.weight = inner.wte.weight
    return model


def experts():
    return Model(
        embed=nn.Embedding(9, 4),
        layers=nn.ModuleList([RouteLayer(), RouteLayer(), RouteLayer()]),
        head=nn.Linear(4, 2),
    )


def fc_norm():
    blocks = nn.Sequential(Block(), Block())
    return Model(
        blocks=blocks,
        norm=nn.Identity(),
        fc_norm=nn.LayerNorm(4),
        head=nn.Linear(4, 2),
    )


class OtherBlock(Block):
    def __init__(self, width=4):
        super().__init__(width)
        self.gate = nn.Linear(width, width)


class MixedStage(nn.Module):
    """Blocks of two classes, as EdgeNeXt, Next-ViT and iFormer have."""

    def __init__(self, width):
        super().__init__()
        self.down = nn.Linear(width, width)
        self.blocks = nn.Sequential(Block(width), Block(width), OtherBlock(width))


def mixed():
    stages = nn.Sequential(MixedStage(4), MixedStage(8))
    return Model(stem=nn.Linear(3, 4), stages=stages, head=nn.Linear(8, 2))


def twins():
    """Lists beside the stages, one item for each, before and after; one fewer."""
    return Model(
        embeds=nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 8)]),
        stages=nn.ModuleList(nn.Sequential(Block(w), Block(w)) for w in (4, 8)),
        pos=nn.ModuleList([nn.Linear(4, 4), nn.Linear(8, 8)]),
        between=nn.ModuleList([nn.Linear(4, 8)]),
        norms=nn.ModuleList([nn.LayerNorm(8)]),
        head=nn.Linear(8, 2),
    )


class AlikeStage(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())


def alike_stages():
    return nn.ModuleList(AlikeStage() for _ in range(3))


LAYOUTS = {
    "mixed": (
        mixed,
        [
            ["head"],
            *(["stages.1.blocks.2"], ["stages.1.blocks.1"]),
            ["stages.1.down", "stages.1.blocks.0"],
            *(["stages.0.blocks.2"], ["stages.0.blocks.1"], ["stages.0.blocks.0"]),
            ["token", "stem", "stages.0.down"],
        ],
    ),
    "lists beside": (
        twins,
        [
            ["norms", "head"],
            ["stages.1.1", "pos.1"],
            ["stages.1.0", "embeds.1", "between.0"],
            ["stages.0.1", "pos.0"],
            ["stages.0.0", "embeds.0"],
            ["token"],
        ],
    ),
    "pairs in a list, and their norm before it": (
        pairs,
        [
            ["head"],
            ["body.norm", "body.layers.2"],
            ["body.layers.1"],
            ["body.layers.0"],
            ["token", "stem"],
        ],
    ),
    "head first, embeddings last": (
        upside_down,
        [
            ["lm_head", "embedding_projection", "embedding_norm", "decoder"],
            ["blocks.1", "ln_f"],
            ["blocks.0"],
            ["token", "wte"],
        ],
    ),
    "vit": (
        vit,
        [["head"], ["blocks.2", "norm"], ["blocks.1"], ["blocks.0"], ["token", "stem"]],
    ),
    "swin": (
        swin,
        [
            ["head"],
            ["layers.2.blocks.1"],
            ["layers.2.downsample", "layers.2.blocks.0"],
            ["layers.1"],
            ["layers.0.blocks.1"],
            ["layers.0.blocks.0"],
            ["token", "stem", "layers.0.downsample"],
        ],
    ),
    "resnet": (
        resnet,
        [
            ["fc"],
            *(["layer3.1"], ["layer3.0"], ["layer2.1"], ["layer2.0"]),
            *(["layer1.1"], ["layer1.0"]),
            ["token", "conv1"],
        ],
    ),
    "tied": (
        gpt,
        [
            ["transformer.h.1", "transformer.ln_f"],
            ["transformer.h.0"],
            ["token", "transformer.token", "transformer.wte"],
        ],
    ),
    "untied": (
        lambda: gpt(tied=False),
        [
            ["lm_head"],
            ["transformer.h.1", "transformer.ln_f"],
            ["transformer.h.0"],
            ["token", "transformer.token", "transformer.wte"],
        ],
    ),
    "experts": (
        experts,
        [["head"], ["layers.2"], ["layers.1"], ["layers.0"], ["token", "embed"]],
    ),
    "fc_norm": (
        fc_norm,
        [["fc_norm", "head"], ["blocks.1"], ["blocks.0"], ["token"]],
    ),
}


def members(model, groups):
    names = {id(param): name for name, param in model.named_parameters()}
    return [[names[id(param)] for param in group["params"]] for group in groups]


def inside(model, prefixes):
    return [
        name
        for prefix in prefixes
        for name, _ in model.named_parameters()
        if f"{name}.".startswith(f"{prefix}.")
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layerwise_groups_hold_one_layer_each(layout):
    build, expected = LAYOUTS[layout]
    model = build()

    groups = layerwise_groups(model, lr=0.1, rate=0.5)

    actual = [sorted(names) for names in members(model, groups)]
    assert actual == [sorted(inside(model, prefixes)) for prefixes in expected]
    assert [group["lr"] for group in groups] == [
        0.1 * 0.5**n for n in range(len(expected))
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layerwise_groups_say_nothing_but_the_rate(layout):
    groups = layerwise_groups(LAYOUTS[layout][0](), lr=0.1, rate=0.5)

    assert all(set(group) == {"params", "lr"} for group in groups)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layerwise_policy_has_the_depth_of_the_groups(layout):
    model = LAYOUTS[layout][0]()
    rows = layerwise_groups(model, lr=1.0, rate=0.5).rows
    optimizer = AdamW(model.parameters(), weight_decay=1.0, wd_policy=layerwise(0.5))

    actual = {row.name: row.weight_decay for row in optimizer.decay_report().rows}

    assert actual == {row.name: 0.5**row.layer for row in rows}


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrap", [Wrapper, lambda m: Wrapper(Wrapper(m))])
def test_layerwise_groups_see_through_a_wrapper(layout, wrap):
    model = LAYOUTS[layout][0]()

    groups = layerwise_groups(wrap(model), lr=0.1, rate=0.5)

    assert members(model, groups) == members(model, layerwise_groups(model, 0.1, 0.5))


def wrapped_list(model):
    model.blocks = Wrapper(model.blocks)
    return model


def test_layerwise_groups_see_through_wrapped_blocks_and_norm():
    model, plain = vit(), vit()
    model.blocks = nn.Sequential(*map(Wrapper, model.blocks))
    model.norm = Wrapper(model.norm)

    rows = layerwise_groups(model, 0.1, 0.5).rows

    assert {(row.name, row.layer) for row in rows} == {
        (row.name, row.layer) for row in layerwise_groups(plain, 0.1, 0.5).rows
    }


GLOBS = {
    "blocks": (vit, "blocks.*", 5),
    "list of blocks": (vit, "blocks", 5),
    "glob on the list": (gpt, "*.h", 3),
    "wrapped list": (lambda: wrapped_list(vit()), "blocks", 5),
    "one block": (lambda: vit(1), "blocks.*", 3),
    "list of one block": (lambda: vit(1), "blocks", 3),
    "list of stages": (swin, "layers", 5),
    "stages": (swin, "layers.*", 5),
    "blocks of stages": (swin, "layers.*.blocks.*", 7),
    "any": (resnet, "layer?", 5),
}


@pytest.mark.parametrize("case", GLOBS)
def test_layers_names_the_blocks(case):
    build, layers, count = GLOBS[case]

    assert len(layerwise_groups(build(), 0.1, 0.5, layers=layers)) == count


def test_layerwise_groups_take_several_modules_in_order():
    body = Model(blocks=nn.Sequential(Block(), Block()))
    head = nn.Linear(4, 2)

    groups = layerwise_groups([body, head], lr=0.1, rate=0.5)

    assert groups[0]["params"] == list(head.parameters())
    assert len(groups) == 4


def test_layerwise_policy_counts_over_several_modules_as_the_groups_do():
    parts = [Model(blocks=nn.Sequential(Block(), Block())), nn.Linear(4, 2)]
    rates = {p: g["lr"] for g in layerwise_groups(parts, 1.0, 0.5) for p in g["params"]}

    optimizer = SGD(parts, weight_decay=1.0, wd_policy=layerwise(0.5))

    rows = optimizer.decay_report().rows
    params = optimizer.param_groups[0]["params"]
    assert [row.weight_decay for row in rows] == [rates[param] for param in params]
    assert len(set(rates.values())) == 4


def test_layerwise_groups_and_policies_train_together():
    model = vit()
    groups = layerwise_groups(model, lr=0.1, rate=0.5)
    policy = exclude(is_bias) * layerwise(0.5)

    optimizer = SGD(groups, weight_decay=0.1, wd_policy=policy, model=model)

    rows = optimizer.decay_report().rows
    assert {row.weight_decay for row in rows if row.name == "head.weight"} == {0.1}
    assert {row.weight_decay for row in rows if row.name == "head.bias"} == {0}
    assert {row.weight_decay for row in rows if row.name == "blocks.2.norm.weight"} == {
        0.05
    }
    assert {row.reason for row in rows if row.name == "token"} == {
        "layerwise(0.5) at 4"
    }


def test_layerwise_groups_take_a_tensor_for_lr():
    groups = layerwise_groups(vit(), lr=torch.tensor(0.5), rate=0.5)

    assert [group["lr"].item() for group in groups[:3]] == [0.5, 0.25, 0.125]
    assert "0.25" in str(groups)


def test_layerwise_groups_print_what_shares_a_layer():
    text = str(layerwise_groups(vit(2), lr=0.1, rate=0.5))

    assert text.splitlines() == [
        "layer      lr  tensors  elements  parameters",
        "    0     0.1        2        10  head",
        "    1    0.05        8        92  blocks.1, norm",
        "    2   0.025        6        84  blocks.0",
        "    3  0.0125        3        20  token, stem",
    ]


def test_layerwise_groups_are_a_plain_list_that_copies():
    groups = layerwise_groups(vit(), lr=0.1, rate=0.5)

    assert isinstance(groups, list)
    assert str(copy.deepcopy(groups)) == str(groups)
    assert str(pickle.loads(pickle.dumps(groups))) == str(groups)


@pytest.mark.parametrize("layers", [None, "blocks.*"])
def test_layerwise_prints_compares_and_pickles(layers):
    policy = layerwise(0.75, layers=layers)

    assert eval(repr(policy)) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert policy != layerwise(0.5, layers=layers)


def two_towers():
    return Model(text=gpt(), image=vit())


ERRORS = {
    "nothing repeats": (
        lambda: layerwise_groups(
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 0.1, 0.5
        ),
        r"blocks of Sequential, .* none were found; .*'\*'.*layers=\"\*\"",
    ),
    "nothing numbered": (
        lambda: layerwise_groups(nn.Linear(2, 2), 0.1, 0.5),
        r"none were found; numbered modules in it: none",
    ),
    "many numbered": (
        lambda: layerwise_groups(
            nn.ModuleDict({f"{name}1": nn.Linear(2, 2) for name in "abcdefghij"}),
            *(0.1, 0.5),
        ),
        r"numbered modules in it: 'a\*', .*'g\*', 'h\*'\. Write",
    ),
    "two towers": (
        lambda: layerwise_groups(two_towers(), 0.1, 0.5),
        r"'image.blocks.\*' \(3 modules, 252 elements\), 'text.transformer.h.\*' \(2 "
        r"modules, 168 elements\) all hold.*as in layers=\"image\.blocks\.\*\", or "
        r".*layers=\[\"image\.blocks\.\*\", \"text\.transformer\.h\.\*\"\]\.",
    ),
    "policy with two towers": (
        lambda: AdamW(two_towers(), wd_policy=layerwise(0.5)),
        r"must say which blocks of Model",
    ),
    "glob of nothing": (
        lambda: layerwise_groups(vit(), 0.1, 0.5, layers="block.*"),
        r"'block\.\*' matches none of \d+ modules .* closest are 'blocks",
    ),
    "one of the blocks": (
        lambda: layerwise_groups(vit(), 0.1, 0.5, layers="blocks.1"),
        r"'blocks\.1' matches one Block .* Write for example layers=\"blocks\.\*\"\.",
    ),
    "module around the blocks": (
        lambda: layerwise_groups(gpt(), 0.1, 0.5, layers="transformer"),
        r"matches one Model .* Write for example layers=\"transformer\.h\.\*\"\.",
    ),
    "module without blocks": (
        lambda: AdamW(vit(), wd_policy=layerwise(0.5, layers="h*d")),
        r"'h\*d' matches one Linear .* Write for example layers=\"blocks\.\*\"\.",
    ),
    "globs of one stack": (
        lambda: layerwise_groups(vit(), 0.1, 0.5, layers=["blocks.*", "blocks.1*"]),
        r"'blocks\.1\*' matches one Block|'blocks.*' and 'blocks.1.*' match some of",
    ),
    "globs of the same blocks": (
        lambda: layerwise_groups(vit(), 0.1, 0.5, layers=["blocks.*", "bl*s.?"]),
        r"'blocks\.\*' and 'bl\*s\.\?' match some of the same modules.* Leave one",
    ),
    "no globs": (
        lambda: layerwise_groups(vit(), 0.1, 0.5, layers=[]),
        r"`layers` is an empty list.* Write for example layers=\[\"text",
    ),
    "stages or blocks": (
        lambda: layerwise_groups(Model(parts=alike_stages()), 0.1, 0.5),
        r"'parts\.\*' \(3 modules, .*\) are alike, and so are 'parts\.\*\.blocks\.\*' "
        r"inside\. Write layers=\"parts\.\*\.blocks\.\*\" or layers=\"parts\.\*\"",
    ),
    "negative rate": (
        lambda: layerwise_groups(vit(), 0.1, -0.5),
        r"`rate` must be finite and >= 0, not -0\.5\. Pass for example rate=0\.75\.",
    ),
    "endless rate": (lambda: layerwise(float("inf")), r"`rate` .* not inf"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_layerwise_says_what_is_wrong(case):
    call, words = ERRORS[case]

    with pytest.raises(ValueError, match=words):
        call()


TYPES = {
    "number": (
        {"layers": 3},
        r"`layers` must be a glob on module names, or a list of globs, not 3 \(int\)",
    ),
    "list": ({"layers": ["a", 2]}, r"not \['a', 2\] \(list\)\. Write .*\.\*\"\."),
    "set": ({"layers": {"a"}}, r"or a list of globs, not \{'a'\} \(set\)"),
    "module": ({"layers": nn.Linear(2, 2)}, r"not a Linear\."),
    "text": (
        {"rate": ".75"},
        r"`rate` must be a number, not '\.75' \(str\)\. Pass .*75",
    ),
}


@pytest.mark.parametrize("case", TYPES)
@pytest.mark.parametrize("call", [layerwise, partial(layerwise_groups, vit(), 0.1)])
def test_layerwise_says_what_type_is_wrong(case, call):
    arguments, words = TYPES[case]

    with pytest.raises(TypeError, match=words):
        call(**{"rate": 0.5, **arguments})


def test_advice_on_layers_is_never_what_was_written():
    model = nn.ModuleDict({"layer": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    with pytest.raises(ValueError, match="matches none") as caught:
        layerwise_groups(model, lr=1.0, rate=0.5, layers="blocks.*")
    assert str(caught.value).endswith('Write for example layers="layer.*".')
    plain = nn.ModuleDict({"stem": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="matches none") as caught:
        layerwise_groups(plain, lr=1.0, rate=0.5, layers="blocks.*")
    assert str(caught.value).endswith(
        "Name modules that repeat; this model has none that are numbered."
    )


def test_glob_matches_modules_that_hold_parameters_and_not_the_model_itself():
    layers = {"a1": nn.Linear(2, 2), "act": nn.ReLU(), "a2": nn.Linear(2, 2)}
    for glob in ("a*", "*"):
        groups = layerwise_groups(Model(**layers), lr=1.0, rate=0.5, layers=glob)
        assert [group["lr"] for group in groups] == [1.0, 0.5, 0.25]


class Rested(nn.Module):
    """Three alike blocks of 84 elements each, and a rest."""

    def __init__(self, rest):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.rest = nn.Linear(rest, 1, bias=False)


def test_modules_of_which_blocks_are_nine_tenths_may_be_stages():
    alike = nn.ModuleDict({"parts": nn.ModuleList(Rested(28) for _ in range(3))})
    with pytest.raises(ValueError, match=r"are alike, and so are 'parts\.\*\.blocks"):
        layerwise_groups(alike, lr=1.0, rate=0.5)
    alike = nn.ModuleDict({"parts": nn.ModuleList(Rested(29) for _ in range(3))})
    assert len(layerwise_groups(alike, lr=1.0, rate=0.5)) == 3


def of_parts(*sizes):
    """Make a module of modules that hold so many elements each."""
    return nn.Sequential(*(nn.Linear(1, size, bias=False) for size in sizes))


def test_advice_where_no_blocks_are_found_names_modules_of_the_model():
    pieces = nn.ModuleDict({"convs": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    with pytest.raises(ValueError, match="none were found") as caught:
        layerwise_groups(pieces, 0.1, 0.5)

    advice = re.search(r'Write for example layers="(.*)"\.', str(caught.value))[1]
    assert advice == "convs.*"
    assert len(layerwise_groups(pieces, 0.1, 0.5, layers=advice)) == 3


def test_blocks_have_three_parts_or_more():
    pieces = nn.ModuleDict({"body": nn.ModuleList(of_parts(4, 4) for _ in range(6))})
    with pytest.raises(ValueError, match="none were found"):
        layerwise_groups(pieces, lr=1.0, rate=0.5)
    blocks = nn.ModuleDict({"body": nn.ModuleList(of_parts(4, 4, 4) for _ in range(6))})
    assert len(layerwise_groups(blocks, lr=1.0, rate=0.5)) == 6


def test_blocks_that_hold_a_tenth_of_the_largest_could_be_meant_as_well():
    small = [of_parts(1, 1, 1), of_parts(1, 1, 2)]
    large = [of_parts(10, 10, 10), of_parts(10, 10, 20)]
    model = nn.ModuleDict({"a": nn.ModuleList(small), "b": nn.ModuleList(large)})
    with pytest.raises(ValueError, match=r"'b\.\*' .*70 elements\), 'a\.\*' "):
        layerwise_groups(model, lr=1.0, rate=0.5)
    large[1].append(nn.Linear(1, 1, bias=False))
    assert len(layerwise_groups(model, lr=1.0, rate=0.5)) == 2


def clip():
    """Two towers as in CLIP, with what belongs to neither around them."""
    model = Model(text=gpt(tied=False).transformer, image=vit(), proj=nn.Linear(4, 4))
    model.logit_scale = nn.Parameter(torch.ones(()))
    model.positional_embedding = nn.Parameter(torch.ones(3, 4))
    return model


TOWERS = ["text.h.*", "image.blocks.*"]


def test_layers_names_several_stacks_of_their_own_depth():
    model = clip()

    groups = layerwise_groups(model, lr=0.1, rate=0.5, layers=TOWERS)

    expected = [
        ["proj", "logit_scale", "image.head"],
        ["text.h.1", "text.ln_f", "image.blocks.2", "image.norm"],
        ["text.h.0", "image.blocks.1"],
        ["text.token", "text.wte", "image.blocks.0"],
        ["image.token", "image.stem", "token", "positional_embedding"],
    ]
    actual = [sorted(names) for names in members(model, groups)]
    assert actual == [sorted(inside(model, prefixes)) for prefixes in expected]


def test_layerwise_policy_takes_several_stacks():
    policy = layerwise(0.5, layers=TOWERS)
    optimizer = AdamW(clip().parameters(), weight_decay=1.0, wd_policy=policy)

    strengths = {r.name: r.weight_decay for r in optimizer.decay_report().rows}

    assert strengths["text.h.1.norm.weight"] == 0.5
    assert strengths["image.blocks.0.norm.weight"] == 0.5**3
    assert repr(policy) == f"layerwise(0.5, layers={TOWERS!r})"
    assert eval(repr(policy)) == policy == pickle.loads(pickle.dumps(policy))
    assert len({policy, layerwise(0.5, layers=tuple(TOWERS))}) == 1


def test_layers_of_one_list_may_be_several_stacks():
    model = vit(4)

    groups = layerwise_groups(
        model, lr=0.1, rate=0.5, layers=["blocks.[01]", "blocks.[23]"]
    )

    expected = [
        ["norm", "head"],
        ["blocks.1", "blocks.3"],
        ["blocks.0", "blocks.2"],
        ["token", "stem"],
    ]
    actual = [sorted(names) for names in members(model, groups)]
    assert actual == [sorted(inside(model, prefixes)) for prefixes in expected]


def test_layers_shared_by_encoder_and_decoder_lie_below_both():
    model = Model(
        shared=nn.Linear(9, 4),
        encoder=Model(blocks=nn.ModuleList([Block(), Block(), Block()])),
        decoder=Model(blocks=nn.ModuleList([Block(), Block()])),
        head=nn.Linear(4, 9),
    )
    layers = ["encoder.blocks", "decoder.blocks"]

    rows = layerwise_groups(model, 0.1, 0.5, layers=layers).rows

    found = {row.name: row.layer for row in rows}
    assert found["shared.weight"] == found["encoder.token"] == 4
    assert found["decoder.token"] == 3
    assert found["encoder.blocks.2.norm.bias"] == found["decoder.blocks.1.norm.bias"]
    assert found["head.weight"] == 0


class Speaking(Model):
    """A model that tells its layers, against all that its structure tells."""

    said = None

    def group_matcher(self, coarse=False):
        assert coarse is False
        return self.said


def speaking(said):
    model = Speaking(
        blocks=nn.Sequential(Block(), Block()),
        stem=nn.Linear(3, 4),
        norm=nn.LayerNorm(4),
        head=nn.Linear(4, 2),
    )
    model.said = said
    return model


SAYS = {
    "expressions": (
        {"stem": r"^stem|token", "blocks": r"^blocks\.(\d+)"},
        [["norm", "head"], ["blocks.1"], ["blocks.0"], ["token", "stem"]],
    ),
    "with the one before": (
        {
            "stem": r"^stem|token",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        },
        [["head"], ["blocks.1", "norm"], ["blocks.0"], ["token", "stem"]],
    ),
    "nothing of a part": (
        {"stem": None, "blocks": [(r"^blocks\.(\d+)", (0,)), (r"^stem", (1, 5))]},
        [["token", "norm", "head"], ["stem"], ["blocks.1"], ["blocks.0"]],
    ),
    "function": (
        lambda name: 0 if name.startswith("head") else 1,
        [["token", "blocks", "stem", "norm"], ["head"]],
    ),
    "function of two": (
        lambda name: (1, int(name.split(".")[1])) if "blocks" in name else (0,),
        [["blocks.1"], ["blocks.0"], ["token", "stem", "norm", "head"]],
    ),
}


# torch says this itself, of itself, when torch.compile is first imported.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", SAYS)
@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, torch.compile])
def test_layers_are_what_the_model_says(case, wrap):
    said, expected = SAYS[case]
    model = speaking(said)

    groups = layerwise_groups(wrap(model), lr=0.1, rate=0.5)

    actual = [sorted(names) for names in members(model, groups)]
    assert actual == [sorted(inside(model, prefixes)) for prefixes in expected]


def test_layers_are_what_the_model_says_of_a_module_called_module():
    model = speaking({"stem": r"^stem|token", "blocks": r"^blocks\.module\.(\d+)"})
    model.blocks = Wrapper(model.blocks)

    rows = layerwise_groups(model, 0.1, 0.5).rows

    found = {row.name: row.layer for row in rows}
    assert found["blocks.1.norm.weight"] == 1
    assert found["blocks.0.norm.weight"] == 2


def test_layers_are_what_the_model_says_inside_another_module():
    model = speaking(SAYS["expressions"][0])
    outer = nn.ModuleDict({"net": model})

    groups = layerwise_groups(outer, lr=0.1, rate=0.5)

    assert members(model, groups) == members(model, layerwise_groups(model, 0.1, 0.5))


def test_layers_that_are_named_go_before_what_the_model_says():
    model = speaking(SAYS["function"][0])

    assert len(layerwise_groups(model, 0.1, 0.5, layers="blocks.*")) == 4


@pytest.mark.parametrize("said", [{}, {"all": r"."}, lambda name: 7])
def test_layers_are_found_where_the_model_says_only_one(said):
    assert len(layerwise_groups(speaking(said), 0.1, 0.5)) == 4


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
def test_lr_scale_leaves_the_rate_to_a_schedule(lr):
    groups = layerwise_groups(vit(), lr=lr, rate=0.5, lr_scale=True)

    assert [group["lr_scale"] for group in groups] == [1, 0.5, 0.25, 0.125, 0.0625]
    assert all(group["lr"] is lr for group in groups)
    assert [float(groups.rows[i].lr) for i in (0, -1)] == [0.5, 0.03125]
    assert "0.25" in str(groups)


def scheduled_by_mae(optimizer, lr):
    """Write rates as MAE's ``util/lr_sched.py`` does."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def test_lr_scale_keeps_layers_apart_under_a_schedule_that_reads_it():
    scaled, plain = vit(), vit()
    groups = layerwise_groups(scaled, lr=0.1, rate=0.5, lr_scale=True)
    optimizer = SGD(groups, model=scaled, wd_policy="no_bias", weight_decay=0.1)
    flat = SGD(layerwise_groups(plain, lr=0.1, rate=0.5), weight_decay=0.1)

    scheduled_by_mae(optimizer, 0.2)
    scheduled_by_mae(flat, 0.2)

    assert [g["lr"] for g in optimizer.param_groups] == [0.2 * 0.5**n for n in range(5)]
    assert {group["lr"] for group in flat.param_groups} == {0.2}


class Heavy(nn.Module):
    """Two blocks that hold less than half of what stands around them."""

    def __init__(self, width):
        super().__init__()
        self.around = nn.Linear(width, 60 - width)
        self.blocks = nn.Sequential(Block(width), Block(width))


def test_stage_whose_blocks_hold_less_than_half_is_a_block_itself():
    stages = nn.ModuleList([Heavy(4), Heavy(5), Heavy(6)])
    for stage in stages:
        held = sum(p.numel() for p in stage.blocks.parameters())
        all_of_it = sum(p.numel() for p in stage.parameters())
        assert all_of_it / 3 < held < all_of_it / 2
    model = nn.ModuleDict({"stages": stages, "head": nn.Linear(4, 2)})
    found = layerwise_groups(model, lr=0.1, rate=0.5)
    assert len(found) == 1 + len(stages)


def distances(model, **arguments):
    """Tell how far each parameter lies below the top, by name."""
    optimizer = SGD(model, 0.1, weight_decay=1.0, wd_policy=layerwise(0.5, **arguments))
    return {
        row.name: round(-math.log2(row.weight_decay))
        for row in optimizer.decay_report()
    }


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4)


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.LayerNorm(4)
        self.to_q = nn.Linear(4, 4)
        self.to_out = nn.Linear(4, 4)


def test_pieces_of_one_block_in_a_sequence_are_no_layers():
    # As vit_pytorch's MaxViT writes them: 11 blocks, and not 55 layers.
    def block():
        return nn.Sequential(Block(), Attend(), Feed(), Attend(), Feed())

    model = Model(
        layers=nn.ModuleList([block() for _ in range(3)]), head=nn.Linear(4, 2)
    )
    found = distances(model)
    assert {found[f"layers.0.{i}.{n}.bias"] for i, n in ((1, "to_q"), (4, "up"))} == {3}
    assert found["layers.2.0.norm.bias"] == 1


def test_a_stack_that_embeds_patches_is_a_stem():
    # As vit_pytorch's T2T: it holds most of a small model's parameters.
    patches = nn.Sequential(*(Block(32) for _ in range(2)))
    blocks = nn.ModuleList(Block() for _ in range(3))
    model = Model(to_patch_embedding=patches, layers=blocks, head=nn.Linear(4, 2))
    found = distances(model)
    assert found["to_patch_embedding.1.norm.bias"] == 4
    assert found["layers.2.norm.bias"] == 1


def test_what_pools_is_above_the_blocks_wherever_it_is_registered():
    # As vit_pytorch's CCT.
    model = Model(
        stem=nn.Linear(3, 4),
        attention_pool=nn.Linear(4, 1),
        blocks=nn.Sequential(*(Block() for _ in range(3))),
        head=nn.Linear(4, 2),
    )
    found = distances(model)
    assert (found["stem.bias"], found["attention_pool.bias"]) == (4, 0)


@pytest.mark.parametrize(
    ("down", "up"), [("down_layers", "up_layers"), ("downs", "ups"), ("down", "up")]
)
def test_what_goes_down_and_up_again_must_be_named(down, up):
    # As MONAI's SegResNet, whose way up was numbered as if beside its way down.
    parts = {
        down: nn.ModuleList(Block(16) for _ in range(4)),
        up: nn.ModuleList(Block() for _ in range(3)),
    }
    model = Model(stem=nn.Linear(3, 4), **parts, head=nn.Linear(4, 2))
    with pytest.raises(ValueError, match="goes down and up again") as caught:
        distances(model)
    line = str(caught.value).rpartition("layers=")[2].removesuffix(".")
    found = distances(model, layers=eval(line))
    assert [found[f"{down}.{i}.norm.bias"] for i in range(4)] == [4, 3, 2, 1]
    assert [found[f"{up}.{i}.norm.bias"] for i in range(3)] == [3, 2, 1]


def test_upper_and_downstream_parts_are_no_way_back():
    parts = {"downstream": nn.ModuleList([nn.Linear(4, 4)]), "upper": nn.ModuleList()}
    blocks = nn.Sequential(*(Block() for _ in range(3)))
    assert distances(Model(blocks=blocks, **parts))["blocks.0.norm.bias"] == 3


def test_rows_that_pool_are_above_the_blocks_though_other_tokens_are_below():
    # As vit_pytorch's NaViT.
    model = vit()
    model.pool_queries = nn.Parameter(torch.ones(4))
    found = distances(model)
    assert (found["token"], found["pool_queries"]) == (4, 0)


class Branches(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.fns = nn.ModuleList([part(), part()])


class Layers(nn.Module):
    def __init__(self, depth):
        super().__init__()
        pairs = (nn.ModuleList([Attend(), Feed()]) for _ in range(depth))
        self.layers = nn.ModuleList(pairs)


def test_parts_of_a_layer_that_have_branches_are_one_layer():
    # As vit_pytorch's parallel ViT: 3 layers, and not 6.
    pairs = [nn.ModuleList(map(Branches, (Attend, Feed))) for _ in range(3)]
    found = distances(Model(layers=nn.ModuleList(pairs), head=nn.Linear(4, 2)))
    assert found["layers.0.0.fns.1.to_q.bias"] == 3
    assert found["layers.0.1.fns.0.up.bias"] == 3


def test_stages_of_an_embedding_and_layers_count_by_layers():
    # As vit_pytorch's CvT: 6 layers, and not 3 stages.
    stages = (nn.Sequential(nn.Linear(4, 4), Layers(depth)) for depth in (1, 2, 3))
    found = distances(Model(stages=nn.Sequential(*stages), head=nn.Linear(4, 2)))
    assert [found[f"stages.2.1.layers.{i}.0.to_q.bias"] for i in range(3)] == [3, 2, 1]
    assert [found[f"stages.{i}.1.layers.0.1.up.bias"] for i in range(3)] == [6, 5, 3]
    assert [found[f"stages.{i}.0.bias"] for i in range(3)] == [7, 5, 3]


def test_stages_in_lists_count_by_layers_though_they_are_alike():
    # As vit_pytorch's CrossFormer and RegionViT of one width.
    stages = (nn.ModuleList([Feed(), Layers(2)]) for _ in range(3))
    found = distances(Model(stages=nn.ModuleList(stages), head=nn.Linear(4, 2)))
    assert found["stages.0.1.layers.0.0.to_q.bias"] > found["stages.1.0.up.bias"]


def test_embedding_of_the_last_stage_is_none_of_the_input():
    # As vit_pytorch's RegionViT: a table of biases after the layers of each stage.
    class Biased(Layers):
        def __init__(self, depth):
            super().__init__(depth)
            self.bias_by_distance = nn.Embedding(3, 2)

    stages = (nn.Sequential(nn.Linear(4, 4), Biased(2)) for _ in range(3))
    found = distances(Model(stages=nn.Sequential(*stages), head=nn.Linear(4, 2)))
    assert found["stages.2.1.bias_by_distance.weight"] == 1
