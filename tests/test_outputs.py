"""Which layer is known as a model's output, and what is done where none is."""

import importlib
import re
import warnings

import pytest
import torch
from torch import nn

from selective_optim import AdamW
from selective_optim.parameters import ModuleIndex
from selective_optim.policies import (
    exclude,
    is_hidden_matrix,
    is_hidden_weight,
    is_output,
    parse,
)
from tests import zoo


def selected(model, selector):
    infos = ModuleIndex(model).everyone()
    return [info.name for info in infos if selector.matches(info)]


def built(**parts):
    model = nn.Module()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def body():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def speaking(accessor, head):
    """Make a model whose accessor returns its head, which is not registered last."""
    cls = type("Speaking", (nn.Module,), {accessor: lambda self: self.answer})
    model = cls()
    model.answer, model.body = head, body()
    return model


def tied():
    model = built(embed=nn.Embedding(9, 4), rest=body(), unembed=nn.Linear(4, 9))
    model.unembed.weight = model.embed.weight
    return model


def mlp(*names):
    return built(**{name: nn.Linear(4, 4) for name in names})


WEIGHT_BIAS = ("weight", "bias")
SURE = {
    "accessor of transformers": (
        speaking("get_output_embeddings", nn.Linear(4, 9)),
        ["answer.weight", "answer.bias"],
    ),
    "accessor of timm": (
        speaking("get_classifier", nn.ModuleList([nn.Linear(4, 9)])),
        ["answer.0.weight", "answer.0.bias"],
    ),
    "accessor of a head of two layers": (
        speaking("get_classifier", mlp("fc1", "fc2")),
        ["answer.fc2.weight", "answer.fc2.bias"],
    ),
    "accessor of two heads": (
        speaking("get_classifier", mlp("head", "head_dist")),
        [f"answer.{n}.{leaf}" for n in ("head", "head_dist") for leaf in WEIGHT_BIAS],
    ),
    "classifier that was taken off": (speaking("get_classifier", nn.Identity()), []),
    "inside another": (
        built(model=speaking("get_classifier", nn.Linear(4, 9))),
        ["model.answer.weight", "model.answer.bias"],
    ),
    "tie": (tied(), ["embed.weight", "unembed.bias"]),
    "name and order": (
        built(body=body(), head=nn.Linear(4, 9)),
        ["head.weight", "head.bias"],
    ),
    "last of a sequence": (
        built(body=body(), classifier=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 9))),
        ["classifier.1.weight", "classifier.1.bias"],
    ),
    "telling name inside": (
        built(body=body(), classifier=mlp("dense", "out_proj")),
        ["classifier.out_proj.weight", "classifier.out_proj.bias"],
    ),
    "question answering": (
        built(body=body(), qa_outputs=nn.Linear(4, 2)),
        ["qa_outputs.weight", "qa_outputs.bias"],
    ),
    "no weights": (nn.LayerNorm(4), []),
}


@pytest.mark.parametrize("case", SURE)
def test_output_is_what_an_accessor_a_tie_or_name_and_order_say(case):
    model, expected = SURE[case]
    assert selected(model, is_output) == expected


UNSURE = {
    "no telling name": (built(body=body()), ["body.1.weight"]),
    "name without order": (
        built(head=nn.Linear(4, 9), body=body()),
        ["head.weight", "body.1.weight"],
    ),
    "two heads": (
        built(body=body(), cls_head=nn.Linear(4, 9), box_head=nn.Linear(4, 4)),
        ["cls_head.weight", "box_head.weight"],
    ),
    "auxiliary head": (
        built(body=body(), aux1=mlp("fc1"), fc=nn.Linear(4, 9)),
        ["aux1.fc1.weight", "fc.weight"],
    ),
    "parallel layers in a head": (
        built(body=body(), head=mlp("cls_score", "bbox_pred")),
        ["head.cls_score.weight", "head.bbox_pred.weight"],
    ),
    "telling name in a block": (
        built(layers=nn.ModuleList([built(output=nn.Linear(4, 4))])),
        ["layers.0.output.weight"],
    ),
}


@pytest.mark.parametrize("case", UNSURE)
def test_output_that_is_not_sure_is_refused_with_its_candidates(case):
    model, names = UNSURE[case]
    with pytest.raises(ValueError, match=r"asks for the output layer") as caught:
        AdamW(model.parameters(), weight_decay=0.1, wd_policy=exclude(is_output))

    assert str(caught.value) == (
        f"`wd_policy` exclude(is_output) asks for the output layer, and of Module it "
        f"is not sure which layer is the output; candidates are "
        f"{', '.join(map(repr, names))}. "
        f"Write wd_policy=\"exclude('{names[-1]}')\" if that is the one."
    )
    advice = re.search(r'wd_policy="(.*)"', str(caught.value))[1]
    assert selected(model, parse(advice).selectors[0]) == names[-1:]


@pytest.mark.parametrize("case", UNSURE)
def test_every_candidate_is_left_out_of_hidden_weights_with_one_warning(case):
    model, names = UNSURE[case]
    model = torch.nn.Sequential(model)  # known afresh, so that it warns again
    names = [f"0.{name}" for name in names]
    with pytest.warns(UserWarning, match="is not certain which layer") as caught:
        hidden = selected(model, is_hidden_weight) + selected(model, is_hidden_matrix)

    assert len(caught) == 1
    assert set(names).isdisjoint(hidden)
    assert all(repr(name) in str(caught[0].message) for name in names)
    line = re.search(r"as in (.*), or pass", str(caught[0].message))[1]
    [selector] = parse(f"only({line})").selectors
    assert names[-1] in selected(model, selector)


def test_hidden_weights_are_those_between_embedding_and_output():
    model = built(
        embed=nn.Embedding(9, 4),
        conv=nn.Conv2d(3, 3, 1),
        norm=nn.LayerNorm((2, 4)),
        layer=nn.Linear(4, 4),
        head=nn.Linear(4, 9),
    )
    model.pos_embed = nn.Parameter(torch.ones(2, 4))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selected(model, is_hidden_matrix) == ["layer.weight"]
        assert selected(model, is_hidden_weight) == ["conv.weight", "layer.weight"]
        assert selected(tied(), is_hidden_matrix) == ["rest.1.weight"]


def test_output_predicate_answers_in_a_policy_of_ones_own():
    model = built(body=body(), head=nn.Linear(4, 9))
    optimizer = AdamW(
        model.parameters(), weight_decay=0.1, wd_policy=lambda info: is_output(info)
    )
    rows = optimizer.decay_report().rows
    assert {r.name for r in rows if r.weight_decay} == {"head.weight", "head.bias"}


def test_layer_that_was_replaced_is_looked_for_again():
    model = built(body=body(), head=nn.Linear(4, 9))
    assert selected(model, is_output) == ["head.weight", "head.bias"]

    model.head, model.fc = nn.Identity(), nn.Linear(4, 2)

    assert selected(model, is_output) == ["fc.weight", "fc.bias"]


# Of the models that were read: right, or None where it is not sure.
REAL = {
    ("torchvision", "resnet50"): ["fc.weight"],
    ("torchvision", "vgg16"): ["classifier.6.weight"],
    ("torchvision", "vit_b_16"): ["heads.head.weight"],
    ("torchvision", "squeezenet1_1"): ["classifier.1.weight"],
    ("torchvision", "inception_v3"): None,
    ("torchvision", "deeplabv3_resnet50"): None,
    ("torchvision", "fasterrcnn_resnet50_fpn"): None,
    ("torchvision", "retinanet_resnet50_fpn"): None,
    ("torchvision", "raft_small"): None,
    ("timm", "resnet18"): ["fc.weight"],
    ("timm", "vit_tiny_patch16_224"): ["head.weight"],
    ("timm", "caformer_s18"): ["head.fc.fc2.weight"],
    ("timm", "crossvit_9_240"): ["head.0.weight", "head.1.weight"],
    ("timm", "deit_tiny_distilled_patch16_224"): ["head.weight", "head_dist.weight"],
    ("timm", "repvit_m1"): ["head.head.l.weight", "head.head_dist.l.weight"],
    ("timm", "sam2_hiera_small"): [],
    ("transformers", "BertForMaskedLM"): ["cls.predictions.decoder.weight"],
    ("transformers", "BertForSequenceClassification"): ["classifier.weight"],
    ("transformers", "BertForQuestionAnswering"): ["qa_outputs.weight"],
    ("transformers", "BertModel"): None,
    ("transformers", "GPT2LMHeadModel"): ["lm_head.weight"],
    ("transformers", "LlamaForCausalLM"): ["lm_head.weight"],
    ("transformers", "LlamaModel"): None,
    ("transformers", "T5ForConditionalGeneration"): ["lm_head.weight"],
    ("transformers", "WhisperForConditionalGeneration"): ["proj_out.weight"],
    ("transformers", "RobertaForSequenceClassification"): [
        "classifier.out_proj.weight"
    ],
    ("transformers", "CLIPModel"): None,
    ("transformers", "DetrForObjectDetection"): None,
    ("transformers", "SegformerForSemanticSegmentation"): [
        "decode_head.classifier.weight"
    ],
    ("transformers", "FunnelForSequenceClassification"): None,
}


def real(library, name):
    if library != "transformers":
        return zoo.build(library, name)
    cls = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        return cls(zoo.shallow(cls.config_class()))


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("library", "name"), REAL)
def test_output_of_a_real_model_is_right_or_not_sure(library, name):
    pytest.importorskip(library)
    model = real(library, name)
    infos = ModuleIndex(model).everyone()
    try:
        found = [i for i in infos if is_output.matches(i) and i.ndim > 1]
    except ValueError:
        found = None

    names = found and [place.name for i in found for place in i.places]
    expected = REAL[library, name]
    assert (found is None) == (expected is None)
    assert set(expected or []) <= set(names or [])
    assert len(found or []) == len(expected or [])


@pytest.mark.parametrize("way", ["method", "of the instance", "static"])
def test_accessor_of_any_kind_says_which_layer_is_the_output(way):
    model = built(a=nn.Linear(2, 2), head=nn.Linear(2, 2), z=nn.Linear(2, 2))

    class Said(type(model)):
        def get_classifier(self):
            return self.head

    head, model.__class__ = model.head, Said
    if way == "of the instance":
        model.get_classifier, head = lambda: model.a, model.a
    if way == "static":
        Said.get_classifier = staticmethod(lambda: head)
    said = {id(p) for p in head.parameters()}
    names = [name for name, p in model.named_parameters() if id(p) in said]
    assert selected(model, is_output) == names
