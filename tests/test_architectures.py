"""The networks that people have, in small: what of each is pruned, what is left and why, and a report that is true."""

import dataclasses
import os

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.network import read

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here

VOCABULARY, WIDTH, TOKENS = 50, 32, 6
TEXT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 16}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TABLE, UNKNOWN = "an embedding table", "no layer kind for the {} of a {}"


def tied(head):
    return f"tied to an embedding (name {head!r} to prune both)"


def tokens(length=TOKENS):
    return torch.randint(3, VOCABULARY, (4, length))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network, a batch for it, how many layers it has, and why which of its weights are left."""

    make: object  # of the package transformers, or None
    batch: object
    layers: int
    left: dict
    share: float = 0.8  # at least this share of the weights is covered


def of_transformers(model, config, **options):
    return lambda transformers: getattr(transformers, model)(getattr(transformers, config)(**options))


def text():
    return {"input_ids": tokens()}


def sequences():
    return {"input_ids": tokens(), "decoder_input_ids": tokens()}


def sounds():
    return {"input_features": torch.randn(4, 8, 20), "decoder_input_ids": tokens()}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 5)

    def forward(self, x):
        made, state = self.recurrent(x)
        return {"made": self.head(made), "state": state}


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(WIDTH, 4, batch_first=True), nn.Linear(WIDTH, 5)

    def forward(self, x):
        made, weights = self.attention(x, x, x)
        return self.head(made), weights


def routers(path, kind):
    return {f"model.layers.{n}.{path}.weight": UNKNOWN.format("weight", kind) for n in range(2)}


LLAMA = {"model.embed_tokens.weight": TABLE}
ARCHITECTURES = {
    "BERT": Architecture(
        of_transformers("BertForSequenceClassification", "BertConfig", **TEXT), text, 2 * 6 + 2,
        {f"bert.embeddings.{kind}_embeddings.weight": TABLE for kind in ("word", "position", "token_type")},
    ),
    "GPT-2": Architecture(
        of_transformers("GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16,
                        bos_token_id=1, eos_token_id=2),
        text, 2 * 4, {"transformer.wte.weight": tied("lm_head"), "transformer.wpe.weight": TABLE},
    ),
    "Llama": Architecture(of_transformers("LlamaForCausalLM", "LlamaConfig", **GROUPED), text, 2 * 7 + 1, LLAMA),
    "Llama, tied": Architecture(
        of_transformers("LlamaForCausalLM", "LlamaConfig", **GROUPED, tie_word_embeddings=True), text, 2 * 7,
        {"model.embed_tokens.weight": tied("lm_head")},
    ),
    "Qwen3": Architecture(of_transformers("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8), text, 15, LLAMA),
    "Mixtral": Architecture(
        of_transformers("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4), text,
        2 * (4 + 4 * 2) + 1, LLAMA | routers("mlp.gate", "MixtralTopKRouter"), 0.95,
    ),
    "Qwen3-MoE": Architecture(
        of_transformers("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **GROUPED, **SPARSE), text, 2 * (4 + 4 * 2) + 1,
        LLAMA | routers("mlp.gate", "Qwen3MoeTopKRouter"), 0.9,
    ),
    "GPT-OSS": Architecture(
        of_transformers("GptOssForCausalLM", "GptOssConfig", **GROUPED, head_dim=8, num_local_experts=4,
                        num_experts_per_tok=2),
        text, 2 * (4 + 4 * 2) + 1,
        LLAMA | routers("mlp.router", "GptOssTopKRouter")
        | {f"model.layers.{n}.mlp.experts.{key}": UNKNOWN.format(key, "GptOssExperts")
           for n in range(2) for key in ("gate_up_proj_bias", "down_proj_bias")},
        0.9,
    ),
    "T5": Architecture(
        of_transformers("T5ForConditionalGeneration", "T5Config", vocab_size=50, d_model=32, d_kv=8, d_ff=48,
                        num_layers=2, num_heads=4),
        sequences, 2 * 6 + 2 * 10,
        {"shared.weight": tied("lm_head")}
        | {f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": TABLE for part in
           ("encoder", "decoder")},
    ),
    "ViT": Architecture(
        of_transformers("ViTForImageClassification", "ViTConfig", **TEXT, image_size=16, patch_size=4, num_labels=5),
        lambda: torch.randn(3, 3, 16, 16), 1 + 2 * 6 + 1,
        {f"vit.embeddings.{key}": UNKNOWN.format(key, "ViTEmbeddings") for key in ("cls_token", "position_embeddings")},
    ),
    "Whisper": Architecture(
        of_transformers(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=50, d_model=32, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10, max_target_positions=16, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        sounds, 2 + 2 * 6 + 2 * 10,
        {"model.decoder.embed_tokens.weight": tied("proj_out"),
         **{f"model.{part}.embed_positions.weight": TABLE for part in ("encoder", "decoder")}},
    ),
    "Mamba": Architecture(
        of_transformers("MambaForCausalLM", "MambaConfig", vocab_size=50, hidden_size=32, num_hidden_layers=2,
                        state_size=4),
        text, 2 * 3,
        {"backbone.embeddings.weight": tied("lm_head")}
        | {f"backbone.layers.{n}.mixer.A_log": UNKNOWN.format("A_log", "MambaMixer") for n in range(2)}
        | {f"backbone.layers.{n}.mixer.{part}.weight": "read by the model without calling its module"
           for n in range(2) for part in ("conv1d", "dt_proj")},
    ),
    "nn.MultiheadAttention": Architecture(lambda _: Attentive(), lambda: torch.randn(4, 6, WIDTH), 5, {}, 1.0),
    "nn.TransformerEncoder": Architecture(
        lambda _: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True), 2),
        lambda: torch.randn(4, 6, WIDTH), 2 * 6, {}, 1.0,
    ),
    "LSTM": Architecture(
        lambda _: Recurrent(), lambda: torch.randn(4, 6, WIDTH), 1,
        {f"recurrent.weight_{part}_l0": UNKNOWN.format(f"weight_{part}_l0", "LSTM") for part in ("ih", "hh")}, 0.0,
    ),
}  # fmt: skip


def made(name):
    """The network and two batches."""
    architecture = ARCHITECTURES[name]
    transformers = None if name.startswith("nn.") or name == "LSTM" else pytest.importorskip("transformers", "5")
    torch.manual_seed(0)
    return architecture.make(transformers).eval(), [architecture.batch() for _ in range(2)]


def output(model, batch):
    returned = model(**batch) if isinstance(batch, dict) else model(batch)
    if isinstance(returned, torch.Tensor):
        return returned
    if isinstance(returned, tuple):
        return returned[0]
    return returned["logits"] if "logits" in returned else returned["made"]


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_pruned_what_is_left_and_that_the_report_is_true(name, mode):
    architecture, (model, data) = ARCHITECTURES[name], made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = model.config.to_dict() if hasattr(model, "config") else {}
    pruned, report = cp.prune(model, data, half, cp.Magnitude(), mode)

    assert len(report.rows) == architecture.layers
    assert {held.name: held.why for held in report.coverage.tensors if held.why} == architecture.left
    assert report.coverage.covered >= architecture.share * report.coverage.total

    for row in report.rows:  # each has the zeros that are counted
        stored = read(pruned, row.name)[:, : row.shape[1]]
        assert (tuple(stored.shape), int((stored != 0).sum())) == (row.shape, row.kept)
        assert row.kept == row.total // 2
    own = dict(pruned.named_parameters())
    covered = report.coverage.total - report.total
    assert covered == report.coverage.total - report.coverage.covered  # no weight is counted twice or missed
    zeros = sum(int((parameter == 0).sum()) for parameter in own.values() if parameter.ndim > 1)
    idle = sum(int((each == 0).sum()) for key, each in model.named_parameters() if each.ndim > 1)
    assert zeros == report.total - report.kept + idle  # nothing else has become zero

    changes = [(output(pruned, batch) - output(model, batch)).double() for batch in data]
    assert report.network.measured == pytest.approx(sum(float(c.square().sum()) for c in changes) ** 0.5, rel=1e-3)
    assert report.network.measured > 0
    if report.network.guaranteed is not None:
        assert report.network.measured <= report.network.guaranteed * (1 + 1e-9)

    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert settings == (model.config.to_dict() if settings else {})


@pytest.mark.parametrize("name", ["Llama, tied", "GPT-2"])
def test_a_tied_head_is_pruned_with_its_embedding_when_it_is_named(name):
    model, data = made(name)
    pruned, report = cp.prune(model, data, half, cp.Magnitude(), names="lm_head")
    assert [row.name for row in report.rows] == ["lm_head"]
    assert pruned.get_input_embeddings().weight is pruned.lm_head.weight
    assert int((pruned.lm_head.weight == 0).sum()) == report.total - report.kept > 0


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_seen_whatever_the_config_says(implementation):
    model, data = made("Mixtral")
    if not hasattr(model.config, "_experts_implementation"):
        pytest.skip("experts are modules in this version of transformers")
    model.set_experts_implementation(implementation)
    layers = {layer.name: layer for layer in cp.capture(model, data, "model.layers.0.mlp.*")}
    assert len(layers) == 8
    assert sum(layer.samples for name, layer in layers.items() if "down" in name) == 2 * 2 * 4 * TOKENS
    _, report = cp.prune(model, data, half, cp.Magnitude(), "cascade", names="*experts*")
    assert len(report.rows) == 16
    assert model.config._experts_implementation == implementation
