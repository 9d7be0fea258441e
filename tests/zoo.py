"""Every model of torchvision, timm and transformers, on the meta device.

A model of transformers is built from the default configuration of its type, with
few layers of each kind; what no automatic class builds, by the first class of the
same module that takes the configuration.
"""

import importlib
import inspect
import warnings
from functools import partial

import torch

DEPTHS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)
AUTOMATIC = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
# Values that these types have no default for, and cannot be built without.
SETTINGS = {
    **{
        name: {"prediction_length": 8}
        for name in ("autoformer", "informer", "time_series_transformer")
    },
    "esm": {"vocab_size": 33, "pad_token_id": 1},
}


def torchvision_names():
    return importlib.import_module("torchvision.models").list_models()


def build_torchvision(name):
    models = importlib.import_module("torchvision.models")
    build = models.get_model_builder(name)
    bare = {"weights": None, "weights_backbone": None}
    known = inspect.signature(build).parameters
    # These read numbers of tensors while they are built.
    device = "cpu" if name.startswith("regnet") else "meta"
    with torch.device(device):
        return build(**{key: value for key, value in bare.items() if key in known})


def timm_names():
    return importlib.import_module("timm").list_models()


def build_timm(name):
    with torch.device("meta"):
        return importlib.import_module("timm").create_model(name)


def transformers_names():
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    return list(auto.CONFIG_MAPPING_NAMES)


def shallow(config, seen=()):
    """Leave at most four layers and experts, of sub-configurations too."""
    for key, value in list(vars(config).items()):
        if key in DEPTHS and isinstance(value, int):
            setattr(config, key, min(value, 4))
        elif hasattr(value, "to_dict") and value not in seen:
            shallow(value, (*seen, config))
    return config


def classes_taking(config):
    """List the model classes beside a configuration's that are made for it."""
    home = type(config).__module__
    try:
        module = importlib.import_module(home.replace("configuration_", "modeling_"))
    except ImportError:
        return []
    base = importlib.import_module("transformers").PreTrainedModel
    return [
        item
        for item in vars(module).values()
        if inspect.isclass(item)
        and issubclass(item, base)
        and item.config_class is type(config)
    ]


def builders(transformers, config):
    automatic = [getattr(transformers, name).from_config for name in AUTOMATIC]
    made = [partial(cls, config) for cls in classes_taking(config)]
    return [*(partial(build, config) for build in automatic), *made]


def build_transformers(name):
    transformers = importlib.import_module("transformers")
    errors = []
    for change in (shallow, lambda config: config):
        config = change(
            transformers.AutoConfig.for_model(name, **SETTINGS.get(name, {}))
        )
        for build in builders(transformers, config):
            try:
                with torch.device("meta"):
                    return build()
            except Exception as error:
                errors.append(error)
    raise errors[0]


LIBRARIES = {
    "torchvision": (torchvision_names, build_torchvision),
    "timm": (timm_names, build_timm),
    "transformers": (transformers_names, build_transformers),
}


def names(library, every=1):
    """List the models of a library, or every so-manieth of them."""
    return LIBRARIES[library][0]()[::every]


def build(library, name):
    """Build a model without memory; what packages say meanwhile is their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LIBRARIES[library][1](name)


# Types of transformers that cannot be built by themselves: parts of a model that are
# built with it, and such as ask for another package, a tokenizer or a backbone.
NOT_ALONE = (
    *("cohere_compass_text", "diffusion_gemma_text", "edgetam_mask_decoder"),
    *("edgetam_prompt_encoder", "edgetam_video_mask_decoder", "gemma4_assistant"),
    *("edgetam_video_prompt_encoder", "gemma4_unified_audio", "gemma4_unified_vision"),
    *("higgs_audio_v2_tokenizer", "hunyuan_vl_text", "idefics_perciever"),
    *("idefics_vision", "layoutxlm", "nougat", "pp_chart2table", "sam_mask_decoder"),
    *("pp_chart2table_vision", "qwen3_omni_moe_talker_text", "qwen4_exp_text"),
    *("sam2_mask_decoder", "sam2_prompt_encoder", "sam2_video_mask_decoder"),
    *("sam2_video_prompt_encoder", "sam3_geometry_encoder", "sam_prompt_encoder"),
    *("sam3_lite_text_geometry_encoder", "sam3_tracker_mask_decoder"),
    *("sam3_tracker_prompt_encoder", "sam3_tracker_video_mask_decoder"),
    *("sam3_tracker_video_prompt_encoder", "sam_hq_mask_decoder"),
    *("sam_hq_prompt_encoder", "sapiens2_head", "t5_gemma_module", "t5gemma2_text"),
    *("t5gemma2_decoder", "t5gemma2_encoder", "timm_backbone", "vibevoice_diffusion"),
)
