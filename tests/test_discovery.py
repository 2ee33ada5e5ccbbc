"""discovery.py on tiny models of many architectures, on models written by hand, and on models that it must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grass_dist.config import ROLES, GrassConfig
from grass_dist.errors import ConfigError, UnsupportedModel
from grass_dist.model.discovery import LayerMap, find_layers

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, LAYERS = 40, 16, 3
COMMON: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 8}
QWEN_MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
OPT = {"ffn_dim": 32}

PLAIN = {"embeddings": ["model.embed_tokens.weight"], "final_norm": ["model.norm.weight"]}
UNTIED = PLAIN | {"lm_head": ["lm_head.weight"]}


def with_bias(norm: str) -> list[str]:
    return [f"{norm}.weight", f"{norm}.bias"]


# name: (model type, its own settings, stack, roles)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str, dict[str, list[str]]]] = {
    "llama": ("llama", {}, "model.layers", UNTIED),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, "model.layers", PLAIN),
    "mistral": ("mistral", {}, "model.layers", UNTIED),
    "qwen2": ("qwen2", {}, "model.layers", UNTIED),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, "model.layers", PLAIN),
    "gemma": ("gemma", GEMMA, "model.layers", PLAIN),
    "gemma2": ("gemma2", GEMMA, "model.layers", PLAIN),
    "gemma3": ("gemma3_text", GEMMA, "model.layers", PLAIN),
    "phi": (
        "phi",
        {},
        "model.layers",
        PLAIN | {"final_norm": with_bias("model.final_layernorm"), "lm_head": with_bias("lm_head")},
    ),
    "phi3": ("phi3", {}, "model.layers", UNTIED),
    "gpt2": (
        "gpt2",
        {},
        "transformer.h",
        {
            "embeddings": ["transformer.wte.weight", "transformer.wpe.weight"],
            "final_norm": with_bias("transformer.ln_f"),
        },
    ),
    "gpt-neox": (
        "gpt_neox",
        {},
        "gpt_neox.layers",
        {
            "embeddings": ["gpt_neox.embed_in.weight"],
            "final_norm": with_bias("gpt_neox.final_layer_norm"),
            "lm_head": ["lm_head.weight"],
        },
    ),
    "opt": (
        "opt",
        OPT,
        "model.decoder.layers",
        {
            "embeddings": ["model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"],
            "final_norm": with_bias("model.decoder.final_layer_norm"),
        },
    ),
    "opt-350m": (  # a narrower embedding, and no final norm
        "opt",
        OPT | {"word_embed_proj_dim": 8, "do_layer_norm_before": False},
        "model.decoder.layers",
        {
            "embeddings": [
                "model.decoder.embed_tokens.weight",
                "model.decoder.embed_positions.weight",
                "model.decoder.project_in.weight",
            ],
            "lm_head": ["model.decoder.project_out.weight"],
        },
    ),
    "bloom": (
        "bloom",
        {},
        "transformer.h",
        {
            "embeddings": [
                "transformer.word_embeddings.weight",
                *with_bias("transformer.word_embeddings_layernorm"),
            ],
            "final_norm": with_bias("transformer.ln_f"),
        },
    ),
    "falcon": (
        "falcon",
        {},
        "transformer.h",
        {"embeddings": ["transformer.word_embeddings.weight"], "final_norm": with_bias("transformer.ln_f")},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 2}, "model.layers", UNTIED),
    "qwen2-moe": ("qwen2_moe", QWEN_MOE | {"shared_expert_intermediate_size": 8}, "model.layers", UNTIED),
    "qwen3-moe-dense-first": ("qwen3_moe", QWEN_MOE | {"mlp_only_layers": [0]}, "model.layers", UNTIED),
    "deepseek-v2": ("deepseek_v2", DEEPSEEK, "model.layers", UNTIED),
    "deepseek-v3": ("deepseek_v3", DEEPSEEK, "model.layers", UNTIED),
    "ctrl-bias-of-tied-head": (
        "ctrl",
        {"dff": 32},
        "transformer.h",
        {
            "embeddings": ["transformer.w.weight"],
            "final_norm": with_bias("transformer.layernorm"),
            "lm_head": ["lm_head.bias"],
        },
    ),
    "lfm2-norm-with-an-embedding's-name": (
        "lfm2",
        {},
        "model.layers",
        {"embeddings": ["model.embed_tokens.weight"], "final_norm": ["model.embedding_norm.weight"]},
    ),
    "modernbert-decoder-head-with-a-transform": (
        "modernbert-decoder",
        {},
        "model.layers",
        {
            "embeddings": ["model.embeddings.tok_embeddings.weight", "model.embeddings.norm.weight"],
            "final_norm": ["model.final_norm.weight"],
            "lm_head": ["lm_head.dense.weight", "lm_head.norm.weight", "decoder.bias"],
        },
    ),
}


def causal_lm(model_type: str, **options: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(model_type, **{**COMMON, **options})
    with torch.device("meta"):  # only structure is looked at
        return transformers.AutoModelForCausalLM.from_config(config)


def llama(**options: Any) -> nn.Module:
    return causal_lm("llama", **options)


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=VOCAB)
    with torch.device("meta"):
        return transformers.T5ForConditionalGeneration(config)


def names(params: tuple[tuple[str, nn.Parameter], ...]) -> list[str]:
    return [name for name, _ in params]


def roles_of(found: LayerMap) -> dict[str, list[str]]:
    return {unit.name: names(unit.params) for unit in found.roles}


def assert_partition(model: nn.Module, found: LayerMap) -> None:
    """Every named parameter is in exactly one place, under its own name, in the order of the model."""
    expected = dict(model.named_parameters())
    groups = [*(unit.params for unit in (*found.layers, *found.roles)), found.other]
    listed = [pair for group in groups for pair in group]
    assert sorted(name for name, _ in listed) == sorted(expected)
    assert all(expected[name] is p for name, p in listed)
    order = {name: i for i, name in enumerate(expected)}
    for group in groups:
        assert names(group) == sorted(names(group), key=order.__getitem__)
    assert [unit.index for unit in found.layers] == list(range(len(found.layers)))
    assert [unit.name for unit in found.roles] == [role for role in ROLES if role in roles_of(found)]
    assert all(unit.params for unit in (*found.layers, *found.roles))
    assert all(unit.index is None for unit in found.roles)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str) -> None:
    model_type, options, stack, roles = ARCHITECTURES[name]
    model = causal_lm(model_type, **options)
    found = find_layers(model)
    assert found.stack == stack
    assert [unit.name for unit in found.layers] == [f"{stack}.{i}" for i in range(LAYERS)]
    for unit in found.layers:
        assert names(unit.params) == [n for n, _ in model.named_parameters() if n.startswith(f"{unit.name}.")]
        assert unit.numel == sum(p.numel() for p in model.get_submodule(unit.name).parameters())
    assert roles_of(found) == roles
    assert found.other == ()
    assert_partition(model, found)


def test_dense_and_moe_layers_do_differ_in_their_parameters() -> None:
    # Otherwise the two cases above that have a dense first layer test nothing.
    for model_type, options in (("qwen3_moe", QWEN_MOE | {"mlp_only_layers": [0]}), ("deepseek_v3", DEEPSEEK)):
        first, second, _ = find_layers(causal_lm(model_type, **options)).layers
        bare = [{n.removeprefix(unit.name) for n in names(unit.params)} for unit in (first, second)]
        assert bare[0] != bare[1]


def test_tied_weight_is_listed_once_as_an_embedding() -> None:
    model: Any = llama(tie_word_embeddings=True)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = find_layers(model)
    places = [n for unit in (*found.layers, *found.roles) for n, p in unit.params if p is model.lm_head.weight]
    assert places == ["model.embed_tokens.weight"]
    assert [unit.name for unit in found.roles] == ["embeddings", "final_norm"]


# -------------------------------------------------------------------------------------------- models written by hand


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)


class OtherBlock(Block):
    pass


class Decoder(nn.Module):
    """Final norm and head in the order of their registration; without any get_..._embeddings()."""

    def __init__(self, width: int = 8, layers: int = 3, vocab: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)


class Wrapper(nn.Module):
    """Holds the model as DDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_sequential_transformer() -> None:
    blocks = nn.Sequential(*(Block() for _ in range(4)))
    model = nn.Sequential(nn.Embedding(50, 8), blocks, nn.LayerNorm(8), nn.Linear(8, 50))
    found = find_layers(model)
    assert (found.stack, len(found.layers), found.layers[3].name) == ("1", 4, "1.3")
    assert roles_of(found) == {"embeddings": ["0.weight"], "final_norm": with_bias("2"), "lm_head": with_bias("3")}
    assert_partition(model, found)


def test_sequential_of_unlike_sequentials_is_no_stack() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm(8)),
        nn.Sequential(*(Block() for _ in range(3))),
        nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 50)),
    )
    found = find_layers(model)
    assert (found.stack, len(found.layers)) == ("1", 3)
    assert roles_of(found) == {
        "embeddings": ["0.0.weight", *with_bias("0.1")],
        "lm_head": [*with_bias("2.0"), *with_bias("2.1")],
    }


def test_blocks_that_are_sequentials_are_a_stack() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))})
    assert [unit.name for unit in find_layers(model).layers] == ["layers.0", "layers.1", "layers.2"]


def test_model_that_is_the_stack() -> None:
    model = nn.Sequential(*(Block() for _ in range(3)))
    found = find_layers(model)
    assert (found.stack, [unit.name for unit in found.layers], found.roles, found.other) == (
        "",
        ["0", "1", "2"],
        (),
        (),
    )
    assert_partition(model, found)


def test_learned_positions_without_a_module() -> None:
    model: Any = Decoder()
    model.pos_emb = nn.Parameter(torch.zeros(1, 12, 8))
    model.emb_norm = nn.Parameter(torch.ones(8))
    model.scale = nn.Parameter(torch.ones(()))
    model.pos_image = nn.Parameter(torch.zeros(1, 12, 5))  # as wide as nothing in the decoder
    found = find_layers(model)
    assert roles_of(found)["embeddings"] == ["pos_emb", "emb_norm", "embed.weight"]
    assert names(found.other) == ["scale", "pos_image"]


def test_positions_with_a_norm_of_their_own() -> None:
    model: Any = Decoder()
    model.extra = nn.ModuleDict({"places": nn.Embedding(12, 8), "norm": nn.LayerNorm(8)})
    found = find_layers(model)
    assert roles_of(found)["embeddings"] == ["embed.weight", "extra.places.weight", *with_bias("extra.norm")]
    assert roles_of(found)["final_norm"] == with_bias("norm")


@pytest.mark.parametrize("wrap", [False, True])
def test_head_is_the_last_linear_over_the_vocabulary(wrap: bool) -> None:
    model: Any = nn.Module()
    model.to_tokens = nn.Linear(8, 50)
    model.decoder = Decoder()
    if wrap:
        model.decoder.draft, model.decoder.head = model.decoder.head, None
        model.last = nn.Linear(8, 50, bias=False)
    found = find_layers(model)
    assert roles_of(found)["lm_head"] == (["last.weight"] if wrap else ["decoder.head.weight"])
    assert "to_tokens.weight" in names(found.other)


def test_layers_that_are_single_modules() -> None:
    model: Any = nn.Module()
    model.decoder = Decoder()
    model.decoder.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    found = find_layers(model)
    assert [names(unit.params) for unit in found.layers] == [with_bias(f"decoder.layers.{i}") for i in range(3)]
    assert roles_of(found)["embeddings"] == ["decoder.embed.weight"]


def test_head_registered_before_the_embedding_it_is_tied_to() -> None:
    model: Any = nn.Module()
    model.head = nn.Linear(8, 50)
    model.decoder = Decoder()
    del model.decoder.head
    model.decoder.embed.weight = model.head.weight
    found = find_layers(model)
    assert roles_of(found)["embeddings"] == ["head.weight"]
    assert roles_of(found)["lm_head"] == ["head.bias"]
    assert_partition(model, found)


@pytest.mark.parametrize("before", [True, False])
def test_a_single_norm_is_the_final_one_wherever_it_is(before: bool) -> None:
    model: Any = nn.Module()
    if before:
        model.norm = nn.LayerNorm(8)
    model.layers = nn.ModuleList(Block() for _ in range(2))
    if not before:
        model.norm = nn.LayerNorm(8)
    assert roles_of(find_layers(model)) == {"final_norm": with_bias("norm")}


def test_of_two_norms_the_one_before_the_layers_is_an_embedding() -> None:
    model: Any = nn.Module()
    model.ln_in = nn.LayerNorm(8)
    model.layers = nn.ModuleList(Block() for _ in range(2))
    model.ln_out = nn.LayerNorm(8)
    assert roles_of(find_layers(model)) == {"embeddings": with_bias("ln_in"), "final_norm": with_bias("ln_out")}


def test_embedding_norm_registered_after_the_layers() -> None:
    config = transformers.MBartConfig(
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        vocab_size=VOCAB,
    )
    with torch.device("meta"):
        model = transformers.MBartForConditionalGeneration(config)
    roles = roles_of(find_layers(model, layers="model.decoder.layers"))
    assert roles["final_norm"] == with_bias("model.decoder.layer_norm")
    assert set(with_bias("model.decoder.layernorm_embedding")) <= set(roles["embeddings"])


def test_vision_tower_and_value_head_are_other() -> None:
    model: Any = nn.Module()
    model.vision = nn.Module()
    model.vision.position = nn.Embedding(5, 8)  # an embedding, but not of the decoder
    model.vision.layers = nn.ModuleList(Block(4) for _ in range(2))  # fewer elements than a layer
    model.vision.norm = nn.LayerNorm(8)
    model.projector = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    model.language = Decoder(layers=9)
    model.value = nn.Linear(8, 1)
    found = find_layers(model)
    assert found.stack == "language.layers"
    assert {name.split(".")[0] for name in names(found.other)} == {"vision", "projector", "value"}
    assert roles_of(found) == {
        "embeddings": ["language.embed.weight"],
        "final_norm": with_bias("language.norm"),
        "lm_head": ["language.head.weight"],
    }
    assert_partition(model, found)


def test_classification_head_is_other() -> None:
    config = transformers.LlamaConfig(**COMMON, num_labels=3)
    with torch.device("meta"):
        model = transformers.LlamaForSequenceClassification(config)
    found = find_layers(model)
    assert roles_of(found) == PLAIN
    assert names(found.other) == ["score.weight"]


def test_get_input_embeddings_not_implemented() -> None:
    class NotImplementedYet(Decoder):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

        get_output_embeddings = get_input_embeddings

    assert roles_of(find_layers(NotImplementedYet())) == roles_of(find_layers(Decoder()))


def test_innermost_input_embedding_counts() -> None:
    class Language(Decoder):
        def get_input_embeddings(self) -> nn.Module:
            return self.embed

    class WithImages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4)
            self.language = Language()

        def get_input_embeddings(self) -> nn.Module:
            return self.patches

    found = find_layers(WithImages())
    assert roles_of(found)["embeddings"] == ["language.embed.weight"]
    assert names(found.other) == with_bias("patches")


def test_module_of_embeddings_with_a_projection() -> None:
    model: Any = Decoder()
    del model.embed
    model.embeddings = nn.ModuleDict({"tokens": nn.Embedding(50, 8), "dense": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    assert len(roles_of(find_layers(model))["embeddings"]) == 5


def test_width_of_layers_that_leave_it_open_is_the_embeddings() -> None:
    model: Any = Decoder(layers=0)
    model.layers.extend(
        nn.Sequential(nn.Linear(8, 24, bias=False), nn.GELU(), nn.Linear(24, 8, bias=False)) for _ in range(2)
    )
    model.adapter = nn.Linear(8, 24)  # would be a project_in if the layers were 24 wide
    assert names(find_layers(model).other) == with_bias("adapter")


def test_embedding_of_a_custom_class_is_asked_for() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.zeros(50, 8))

    class Custom(Decoder):
        def __init__(self) -> None:
            super().__init__()
            del self.embed
            self.table = Table()

    class Asked(Custom):
        def get_input_embeddings(self) -> nn.Module:
            return self.table

    assert names(find_layers(Wrapper(Custom())).other)[-1] == "module.table.rows"
    assert roles_of(find_layers(Wrapper(Asked())))["embeddings"] == ["module.table.rows"]


def test_zero3_shapes_are_used() -> None:
    model = Decoder(layers=3)
    expected = find_layers(model)
    numel = expected.layers[0].numel
    for p in model.parameters():
        p.ds_shape = p.shape  # type: ignore[attr-defined]
        p.data = torch.empty(0)
    found = find_layers(model)
    assert (found.stack, roles_of(found), found.layers[0].numel) == (expected.stack, roles_of(expected), numel)


# ---------------------------------------------------------------------------------------------------- shared parameters


def test_parameter_shared_between_layers_is_the_first_ones() -> None:
    model: Any = Decoder(layers=3)
    model.layers[2].up = model.layers[1].up
    found = find_layers(model)
    assert "layers.1.up.weight" in names(found.layers[1].params)
    assert names(found.layers[2].params) == [*with_bias("layers.2.norm"), *with_bias("layers.2.down")]
    assert_partition(model, found)


def test_a_block_that_is_used_twice_is_one_layer() -> None:
    model = Decoder(layers=3)
    model.layers.insert(1, model.layers[0])
    found = find_layers(model)
    assert [(unit.name, unit.index) for unit in found.layers] == [("layers.0", 0), ("layers.2", 1), ("layers.3", 2)]
    assert_partition(model, found)


def test_one_block_that_is_used_many_times_is_refused() -> None:
    model = Decoder(layers=1)
    model.layers.extend([model.layers[0]] * 3)
    with pytest.raises(UnsupportedModel, match=r'layers holds one block, .* layers="layers" with active_layers=1'):
        find_layers(model)
    assert len(find_layers(model, layers="layers").layers) == 1


def test_layer_that_is_also_registered_elsewhere() -> None:
    model: Any = nn.Module()
    decoder = Decoder(layers=3)
    model.first = decoder.layers[0]  # named_parameters() now names the parameters of layer 0 after this
    model.decoder = decoder
    found = find_layers(model)
    assert found.layers[0].name == "decoder.layers.0"
    assert names(found.layers[0].params)[0] == "first.norm.weight"
    assert found.other == ()
    assert_partition(model, found)


def test_embedding_shared_with_a_layer_keeps_its_role() -> None:
    model: Any = Decoder(layers=3)
    model.layers[2].embed = model.embed
    model.layers[2].head = model.head
    found = find_layers(model)
    assert roles_of(found)["embeddings"] == ["embed.weight"]
    assert roles_of(found)["lm_head"] == ["layers.2.head.weight"]
    assert_partition(model, found)


# ---------------------------------------------------------------------------------------------------- choice of stack


def test_t5_has_two_stacks_or_the_one_that_is_named() -> None:
    model = t5()
    both = find_layers(model)
    assert [unit.name for unit in both.layers] == [
        f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)
    ]
    norms = [f"{side}.final_layer_norm.weight" for side in ("encoder", "decoder")]
    assert roles_of(both) == {"embeddings": ["shared.weight"], "final_norm": norms} and both.other == ()
    assert both == find_layers(model, layers=["decoder.block", "encoder.block"])
    assert_partition(model, both)
    found = find_layers(model, layers="decoder.block")
    assert [unit.name for unit in found.layers] == ["decoder.block.0", "decoder.block.1"]
    assert roles_of(found) == {"embeddings": ["shared.weight"], "final_norm": ["decoder.final_layer_norm.weight"]}
    assert found.other and all(name.startswith("encoder.") for name in names(found.other))
    assert found.others == () and found.aside == set(names(found.other))
    assert_partition(model, found)


def two(big: int, small: int, width: int = 8) -> Any:
    lists = {"small": [Block(width) for _ in range(small)], "big": [Block() for _ in range(big)]}
    return nn.ModuleDict({name: nn.ModuleList(blocks) for name, blocks in lists.items()})


@pytest.mark.parametrize(
    ("sizes", "stacks"),
    [
        ({"big": 8, "small": 2}, ("small", "big")),  # a quarter
        ({"big": 32, "small": 2}, ("small", "big")),  # more than a layer
        ({"big": 3, "small": 2, "width": 5}, ("small", "big")),  # a quarter, and less than a layer
        ({"big": 9, "small": 2, "width": 4}, ("big",)),
    ],
)
def test_a_second_stack_competes_if_it_is_large(sizes: dict[str, int], stacks: tuple[str, ...]) -> None:
    model = two(**sizes)
    found = find_layers(model)
    assert found.stacks == stacks
    assert [unit.number for unit in found.layers] == list(range(len(found.layers)))
    assert len(found.others) == (0 if "small" in stacks else 12)
    assert_partition(model, found)


@pytest.mark.parametrize("by_params", [False, True])
def test_what_the_user_has_frozen_is_no_stack(by_params: bool) -> None:
    model = two(big=8, small=4)
    if not by_params:
        model.big.requires_grad_(False)
    params = model.small.parameters() if by_params else None
    assert find_layers(model, params=params).stacks == ("small",)
    model.requires_grad_(False)
    assert find_layers(model).stacks == ("small", "big")  # nothing trains, and that is said later


def test_a_list_of_heads_is_no_second_stack() -> None:
    model: Any = Decoder(layers=3)
    model.heads = nn.ModuleList(nn.Linear(8, 50) for _ in range(4))
    assert find_layers(model).stacks == ("layers",)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [(["small", "small"], "it is named twice"), (["small", "small.0.inner"], "within 'small'"), ([], None)],
)
def test_wrong_lists_of_stacks(layers: list[str], problem: str | None) -> None:
    model = two(big=2, small=2)
    model.small[0].inner = nn.ModuleList(Block() for _ in range(2))
    if problem is None:
        with pytest.raises(ConfigError, match="it names no stack"):
            GrassConfig(layers=layers)  # type: ignore[arg-type]
        return
    with pytest.raises(ConfigError, match=problem):
        find_layers(model, layers=layers)


def test_one_shared_block_is_refused_with_the_reason() -> None:
    model: Any = Decoder()
    model.layers = nn.ModuleList([nn.ModuleDict({"inner": nn.ModuleList([Block()])})])
    with pytest.raises(
        UnsupportedModel, match=r'layers holds one block, .* layers="layers" with active_layers=1 trains'
    ):
        find_layers(model)
    assert len(find_layers(model, layers="layers").layers) == 1


def test_outermost_list_wins() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.experts = nn.ModuleList(Block() for _ in range(6))

    model = nn.ModuleDict({"layers": nn.ModuleList(Experts() for _ in range(2))})
    assert find_layers(model).stack == "layers"


def test_mlp_has_no_stack() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(UnsupportedModel, match=r'Sequential has no .* set layers="FQN of the layer stack"\.$'):
        find_layers(model)


@pytest.mark.parametrize("with_tower", [True, False])
def test_mixed_layers_are_not_skipped_for_others_in_or_near_them(with_tower: bool) -> None:
    class WithExperts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    model: Any = nn.Module()
    model.layers = nn.ModuleList([Block(), WithExperts(), Block(), Block()])
    if with_tower:
        model.tower = nn.ModuleList(OtherBlock() for _ in range(2))
    found = find_layers(model)
    assert found.stacks == (("layers", "tower") if with_tower else ("layers",))
    assert [unit.name for unit in found.layers[:4]] == [f"layers.{i}" for i in range(4)]
    assert_partition(model, found)
    assert find_layers(model, layers="layers").layers == found.layers[:4]
    model.layers.append(nn.Linear(8, 8))  # not a block: the list is taken when it is named
    with pytest.raises(UnsupportedModel, match=r'e\.g\. layers="layers", whose blocks are of several classes'):
        find_layers(model)
    assert len(find_layers(model, layers="layers").layers) == 5


@pytest.mark.parametrize(
    ("layers", "problem", "fix"),
    [
        ("model.layer", "LlamaForCausalLM has no module of that name", "'model.layers'"),
        ("", "it is a LlamaForCausalLM", "'model.layers'"),
        ("model.norm", "it is a LlamaRMSNorm, and no nn.ModuleList or nn.Sequential", "'model.layers'"),
    ],
)
def test_wrong_layers(layers: str, problem: str, fix: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_layers(llama(), layers=layers)
    assert (error.value.field, error.value.value) == ("layers", layers)
    assert problem in error.value.problem
    assert fix in error.value.fix


def test_wrong_layers_without_parameters() -> None:
    model: Any = Decoder()
    model.acts = nn.Sequential(nn.ReLU(), nn.ReLU())
    with pytest.raises(ConfigError, match="none of its children has parameters; use 'layers'"):
        find_layers(model, layers="acts")


def test_wrong_layers_of_a_model_without_any() -> None:
    with pytest.raises(ConfigError, match="no module of that name; use another model"):
        find_layers(nn.ModuleDict({"a": nn.Linear(2, 2)}), layers="b")


def test_given_stack_may_be_of_any_classes_and_of_one_child() -> None:
    model: Any = nn.Module()
    model.mixed = nn.Sequential(Block(), nn.ReLU(), nn.Linear(8, 8))
    model.one = nn.ModuleList([Block()])
    found = find_layers(model, layers="mixed")
    assert [(unit.name, unit.index) for unit in found.layers] == [("mixed.0", 0), ("mixed.2", 1)]
    assert [unit.name for unit in find_layers(model, layers="one").layers] == ["one.0"]


# ------------------------------------------------------------------------------------------------------------ stages


class Stage(nn.Module):
    def __init__(self, width: int, depth: int, block: type[Block] = Block) -> None:
        super().__init__()
        self.down = nn.Linear(width // 2, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))


@pytest.mark.parametrize("bare", [False, True])
def test_the_blocks_of_all_stages_are_the_layers(bare: bool) -> None:
    model: Any = nn.Module()
    model.stem = nn.Conv2d(3, 4, 2)
    stages = [Stage(width, depth) for width, depth in ((4, 1), (8, 2), (16, 3))]
    model.stages = nn.ModuleList(stage.blocks if bare else stage for stage in stages)
    model.norm = nn.LayerNorm(16)
    model.classifier = nn.Linear(16, 3)
    inner = [f"stages.{i}{'' if bare else '.blocks'}" for i in range(3)]
    found = find_layers(model)
    assert found.stacks == tuple(inner)
    assert [unit.name for unit in found.layers] == [f"{inner[i]}.{n}" for i in range(3) for n in range(i + 1)]
    assert roles_of(found)["final_norm"] == with_bias("norm")
    assert ("stages.1.down.weight" in names(found.other)) is not bare
    assert_partition(model, found)
    one = find_layers(model, layers=inner[2])
    assert len(one.layers) == 3 and {name.split(".")[1] for name in one.aside} == {"0", "1"}
    assert [unit.name for unit in find_layers(model, layers="stages").layers] == ["stages.0", "stages.1", "stages.2"]


def test_layers_with_lists_of_experts_are_no_stages() -> None:
    model: Any = Decoder(layers=0)
    model.layers.extend(Stage(8, 4) for _ in range(3))  # all of one width
    model.layers.append(Stage(8, 5))
    assert find_layers(model).stacks == ("layers",)


@pytest.mark.parametrize("bare", [False, True])
def test_layers_with_lists_of_unlike_parts_are_no_stages(bare: bool) -> None:
    model: Any = Decoder(layers=0)
    for width in (8, 32, 8, 32):  # a dense part and one with experts, by turns
        stage = Stage(8, 0)
        stage.blocks.extend([Block(8), OtherBlock(width)])
        model.layers.append(stage.blocks if bare else stage)
    found = find_layers(model)
    assert (found.stacks, len(found.layers)) == (("layers",), 4)


def test_stages_with_much_beside_their_blocks_are_layers() -> None:
    model: Any = nn.Module()
    model.stages = nn.ModuleList(Stage(width, 2) for width in (4, 8, 16))
    for stage in model.stages:
        stage.up = nn.Linear(64, 64)
    assert find_layers(model).stacks == ("stages",)


def test_a_list_of_single_weights_is_no_second_stack() -> None:
    model: Any = Decoder(layers=3)
    model.patches = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 40, 4), nn.BatchNorm2d(40)) for _ in range(3))
    assert find_layers(model).stacks == ("layers",)


# ---------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("given_name", [None, "model.layers", "module.model.layers"])
def test_wrapped_model_has_the_names_of_the_wrapper(given_name: str | None) -> None:
    model = Wrapper(llama())
    found = find_layers(model, layers=given_name)
    assert found.stack == "module.model.layers"
    assert roles_of(found) == {role: [f"module.{n}" for n in params] for role, params in UNTIED.items()}
    assert found.other == ()
    assert_partition(model, found)


def test_compiled_model() -> None:
    model = torch.compile(Wrapper(llama()))  # nothing is compiled before the first call
    assert isinstance(model, nn.Module)
    for layers in (None, "model.layers", "module.model.layers"):
        found = find_layers(model, layers=layers)
        assert found.stack == "_orig_mod.module.model.layers"
        assert found.other == ()
        assert_partition(model, found)


def test_exact_name_goes_before_the_wrapped_one() -> None:
    model: Any = Wrapper(Decoder(layers=2))
    model.layers = nn.ModuleList(Block() for _ in range(4))
    assert find_layers(model, layers="layers").stack == "layers"


class Marker:
    """Stands for torch's FSDPModule."""


def shard(module: nn.Module, prefix: str = "FSDP") -> None:
    """Changes the class of a module as fully_shard() does."""
    cls = type(module)
    module.__class__ = type(prefix + cls.__name__, (Marker, cls), {})


@pytest.mark.parametrize("sharded", [(0,), (0, 1), (0, 1, 2)])
def test_sharded_layers_are_of_one_class(sharded: tuple[int, ...]) -> None:
    model: Any = llama()
    expected = find_layers(model)
    for i in sharded:
        shard(model.model.layers[i])
    shard(model.lm_head)
    shard(model)
    found = find_layers(model)
    assert found == expected
    with pytest.raises(ConfigError, match="it is a LlamaForCausalLM"):
        find_layers(model, layers="")


def test_only_the_generated_classes_are_seen_through() -> None:
    model: Any = Decoder(layers=2)
    shard(model.layers[0], prefix="Quantized")
    with pytest.raises(UnsupportedModel, match="two or more equal layers"):
        find_layers(model)


# --------------------------------------------------------------------------------------------------------- properties

EXTRAS = {
    "norm": lambda w: nn.LayerNorm(w),
    "norm_of_another_width": lambda w: nn.LayerNorm(w + 1),
    "table": lambda w: nn.Embedding(7, w),
    "linear": lambda w: nn.Linear(w, 1),
    "square": lambda w: nn.Linear(w, w),
    "conv": lambda w: nn.Conv1d(w, w, 3),
    "nothing": lambda w: nn.ReLU(),
    "projector": lambda w: nn.Sequential(nn.Linear(w, w), nn.GELU(), nn.Linear(w, w)),
    "one_layer": lambda w: nn.ModuleList([Block(w)]),
    "head": lambda w: nn.Linear(w, 50),
}


@settings(max_examples=150, deadline=None)
@given(
    layers=st.integers(2, 5),
    width=st.sampled_from([2, 4, 8]),
    before=st.lists(st.sampled_from(sorted(EXTRAS)), max_size=4),
    after=st.lists(st.sampled_from(sorted(EXTRAS)), max_size=4),
    outer=st.lists(st.sampled_from(sorted(EXTRAS)), max_size=3),
    tied=st.booleans(),
    own=st.booleans(),
    depth=st.integers(0, 2),
)
def test_every_parameter_is_in_one_place(
    layers: int, width: int, before: list[str], after: list[str], outer: list[str], tied: bool, own: bool, depth: int
) -> None:
    inner: Any = nn.Module()
    for i, kind in enumerate(before):
        inner.add_module(f"before_{kind}_{i}", EXTRAS[kind](width))
    inner.blocks = nn.ModuleList(Block(width) for _ in range(layers))
    for i, kind in enumerate(after):
        inner.add_module(f"after_{kind}_{i}", EXTRAS[kind](width))
    if own:
        inner.own = nn.Parameter(torch.zeros(width))
        inner.pos = nn.Parameter(torch.zeros(3, width))
    if tied:
        inner.embed = nn.Embedding(50, width)
        inner.head = nn.Linear(width, 50)
        inner.head.weight = inner.embed.weight
    model: Any = inner
    for level in range(depth):
        outside: Any = nn.Module()
        for i, kind in enumerate(outer):
            outside.add_module(f"outer{level}_{kind}_{i}", EXTRAS[kind](width))
        outside.inner = model
        model = outside

    found = find_layers(model)
    assert found.stack == "inner." * depth + "blocks"
    assert len(found.layers) == layers
    assert all(len(unit.params) == 6 and unit.numel == found.layers[0].numel for unit in found.layers)
    assert_partition(model, found)
    roles = roles_of(found)
    if tied:
        assert any(name.endswith("embed.weight") for name in roles["embeddings"])
        assert not any(name.endswith("embed.weight") for name in roles.get("lm_head", ()))
    if own:
        assert any(name.endswith("own") for name in roles["final_norm"])
    other = names(found.other)
    for kind in ("conv", "projector", "one_layer", "norm_of_another_width"):  # never a part of the decoder's own
        count = len(list(EXTRAS[kind](width).parameters())) * (
            before.count(kind) + after.count(kind) + depth * outer.count(kind)
        )
        assert sum(f"_{kind}_" in name for name in other) == count
