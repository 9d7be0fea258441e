"""The routings of the page on Muon give Muon what the projects themselves give it."""

import re
import warnings
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.pages import ROOT
from selective_optim import Muon, param_groups
from selective_optim.policies import is_hidden_matrix, is_hidden_weight
from tests.support.pages import blocks
from tests.support.routes import needs_muon

pytestmark = [
    needs_muon,
    pytest.mark.integration,
    # What other packages say of themselves.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def routings():
    names = {"__name__": "page"}
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks(ROOT / "selective_optim" / "docs" / "muon.md"):
            exec(block.code, names)
    return names["routings"]


def to_muon(model, selector):
    routes = {"muon": selector, "adamw": "*"}
    groups = param_groups(model, "all", 0.1, routes=routes, key="use_muon")
    return {row.name for row in groups.rows if row.route == "muon"}


def matrices(model, names):
    return {name for name in names if model.get_parameter(name).ndim == 2}


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "mobilenetv3_small_050"],
)
def test_timm(routings, name):
    optim = pytest.importorskip("timm.optim")
    model = pytest.importorskip("timm").create_model(name)
    theirs = optim.create_optimizer_v2(model, "muon", lr=0.02)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    theirs.step()
    named = model.named_parameters()
    expected = {name for name, p in named if theirs.state[p]["use_muon"]}
    assert to_muon(model, routings["timm"]["muon"][0]) == expected


def test_torchtitan():
    kimi = pytest.importorskip("torchtitan.models.kimi_k2_7")
    registry = pytest.importorskip("torchtitan.models.kimi_k2_7.config_registry")
    spec = kimi.model_registry("debugmodel")
    with torch.device("meta"):
        model = spec.model.build()
    muon, rest = registry._dist_muon_optimizer(spec, lr=1e-3).param_groups
    assert rest.optimizer_name == "AdamW"
    names = [name for name, _ in model.named_parameters()]
    expected = set(filter(re.compile(muon.pattern).search, names))
    assert to_muon(model, is_hidden_weight & "layers.*") == expected
    actual = to_muon(model, is_hidden_matrix & "layers.*")
    assert actual == matrices(model, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_megatron(routings, tied):
    core = pytest.importorskip("megatron.core")
    gpt = pytest.importorskip("megatron.core.models.gpt")
    specs = pytest.importorskip("megatron.core.models.gpt.gpt_layer_specs")
    transformer = pytest.importorskip("megatron.core.transformer")
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        core.parallel_state.initialize_model_parallel()
        config = transformer.TransformerConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=2,
            use_cpu_initialization=True,
        )
        model = gpt.GPTModel(
            config,
            specs.get_gpt_layer_local_spec(),
            vocab_size=32,
            max_sequence_length=8,
            share_embeddings_and_output_weights=tied,
        )
    finally:
        core.parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    actual = to_muon(model, routings["megatron"]["muon"][0])
    assert "embedding.position_embeddings.weight" in actual
    assert "embedding.word_embeddings.weight" not in actual
    assert "output_layer.weight" not in actual
    assert len([name for name in actual if "linear" in name]) == 8
    # Ours differ by what is an embedding, and by a candidate where it is not sure.
    ours = {row.name for row in Muon(model).decay_report() if row.route == "muon"}
    assert ours <= actual - {"embedding.position_embeddings.weight"}


def test_nanochat():
    gpt = pytest.importorskip("nanochat.gpt")
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(n_layer=2, n_embd=128, n_head=2, n_kv_head=2))
    groups = model.setup_optimizer().param_groups
    theirs = [p for g in groups if g["kind"] == "muon" for p in g["params"]]
    names = {id(param): name for name, param in model.named_parameters()}
    expected = {names[id(param)] for param in theirs}
    assert to_muon(model, "transformer.h.*") == expected
    assert to_muon(model, is_hidden_matrix & "transformer.h.*") == expected


@pytest.mark.parametrize("tied", [True, False])
def test_moonlight(routings, tied):
    """Its rule as its example states it; the example itself cannot be imported."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        tie_word_embeddings=tied,
    )
    model = transformers.Qwen2ForCausalLM(config)
    tables = ("embed_tokens", "lm_head")
    expected = {
        name
        for name, param in model.named_parameters()
        if param.ndim >= 2 and not any(table in name for table in tables)
    }
    assert to_muon(model, routings["moonlight"]["muon"][0]) == expected
    ours = Muon(model.parameters()).decay_report()
    assert {row.name for row in ours if row.route == "muon"} == expected


def test_dion(routings):
    """Its rule as its README states it: matrices of blocks, and three other groups."""
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(32, 8),
            "blocks": nn.ModuleList(
                nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)
            ),
            "lm_head": nn.Linear(8, 32),
        }
    )
    expected = {
        name for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2
    }
    routes = {name: route[0] for name, route in routings["dion"].items()}
    groups = param_groups(model, "all", 0.1, routes=routes, key="algorithm")
    found = {row.name: row.route for row in groups.rows}
    assert {name for name, route in found.items() if route == "muon"} == expected
    assert found["embedding.weight"] == "table"
    assert found["lm_head.weight"] == found["lm_head.bias"] == "head"
