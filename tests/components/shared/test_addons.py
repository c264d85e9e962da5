"""What stands beside a base: bottlenecks by hand-written layers, soft prompts by PEFT's."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from components.shared import addons, families
from components.shared.addons import Addon
from components.shared.errors import TuneyardError

IDS = torch.tensor([[2, 17, 99, 60, 31, 8, 3], [2, 40, 41, 42, 3, 0, 0]])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def stirred(model):
    """Give what was added weights that show; near-identity would hide a bottleneck that is not there."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if addons.own(name):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def bert_by_hand(model, hidden, mask, after_attention, after_feed_forward):
    """BERT's layers with a function applied to the output of each sub-layer before its residual is added."""
    functional = torch.nn.functional
    for index, layer in enumerate(model.encoder.layer):
        own, config = layer.attention.self, model.config
        rows, tokens, width = hidden.shape
        heads = config.num_attention_heads

        def split(linear, states, shape=(rows, tokens, heads, width // heads)):
            return linear(states).view(shape).transpose(1, 2)

        scores = split(own.query, hidden) @ split(own.key, hidden).transpose(2, 3) / (width // heads) ** 0.5
        scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)
        mixed = (scores @ split(own.value, hidden)).transpose(1, 2).reshape(rows, tokens, width)
        out = layer.attention.output
        dense = functional.linear(mixed, out.dense.weight, out.dense.bias)
        hidden = out.LayerNorm(after_attention(index, dense) + hidden)
        inner = functional.gelu(layer.intermediate.dense(hidden))
        dense = functional.linear(inner, layer.output.dense.weight, layer.output.dense.bias)
        hidden = layer.output.LayerNorm(after_feed_forward(index, dense) + hidden)
    return hidden


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_bottlenecks_compute_what_their_papers_say(tiny_encoder, kind):
    model = AutoModel.from_pretrained(tiny_encoder, attn_implementation="eager")
    before = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    moved = addons.attach(model, Addon(kind=kind, size=6))
    near = model.eval()(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(near[MASK == 1], before[MASK == 1], atol=2e-3, rtol=0)  # near-identity
    weights = dict(stirred(model).named_parameters())
    activation = torch.nn.functional.gelu if kind == "houlsby" else torch.relu

    def bottleneck(path):
        def apply(index, out):
            at = f"encoder.layer.{index}.{path}.bottleneck"
            down = out @ weights[f"{at}.down.weight"].T + weights[f"{at}.down.bias"]
            return out + activation(down) @ weights[f"{at}.up.weight"].T + weights[f"{at}.up.bias"]

        return apply

    with torch.inference_mode():
        found = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        attention = bottleneck("attention.output.dense") if kind == "houlsby" else lambda index, out: out
        expected = bert_by_hand(
            model, model.embeddings(input_ids=IDS), MASK, attention, bottleneck("output.dense")
        )
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], atol=2e-5, rtol=1e-4)
    norms = {n for n in weights if "LayerNorm" in n and n.startswith("encoder")}
    assert set(moved) == (norms if kind == "houlsby" else set()) and norms
    assert sum("down.weight" in n for n in weights) == (4 if kind == "houlsby" else 2)


@pytest.fixture(params=["sft", "classification"])
def two_models(request, tiny_causal, tiny_encoder):
    """Two copies of a model, and PEFT's name of its task."""
    if request.param == "sft":
        return [AutoModelForCausalLM.from_pretrained(tiny_causal).eval() for _ in range(2)], "CAUSAL_LM"
    kind = AutoModelForSequenceClassification
    models = []
    for _ in range(2):
        torch.manual_seed(0)  # of the head
        models.append(kind.from_pretrained(tiny_encoder).eval())
    return models, "SEQ_CLS"


@pytest.mark.slow  # imports PEFT
def test_a_prefix_equals_pefts(two_models):
    from peft import PrefixTuningConfig, get_peft_model

    (ours, theirs), task = two_models
    addons.attach(ours, Addon(kind="p_tuning_v2", size=4))
    stirred(ours)
    config = families.body(ours).config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    reference = get_peft_model(
        theirs,
        PrefixTuningConfig(
            task_type=task,
            num_virtual_tokens=4,
            num_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            token_dim=16 * heads,
        ),
    ).eval()
    with torch.no_grad():
        reference.prompt_encoder["default"].embedding.weight.copy_(families.body(ours).soft_prompt.values)
    with torch.inference_mode():
        found = ours(input_ids=IDS, attention_mask=MASK).logits
        expected = reference(input_ids=IDS, attention_mask=MASK).logits
        plain = reference.get_base_model()(input_ids=IDS, attention_mask=MASK).logits
    text = MASK == 1 if found.ndim == 3 else slice(None)
    torch.testing.assert_close(found[text], expected[text], atol=1e-5, rtol=1e-4)
    assert (found[text] - plain[text]).abs().max() > 1e-3


@pytest.mark.slow  # imports PEFT
def test_a_prompt_equals_pefts(two_models):
    from peft import PromptTuningConfig, get_peft_model

    (ours, theirs), task = two_models
    addons.attach(ours, Addon(kind="prompt", size=4))
    stirred(ours)
    reference = get_peft_model(theirs, PromptTuningConfig(task_type=task, num_virtual_tokens=4)).eval()
    with torch.no_grad():
        reference.prompt_encoder["default"].embedding.weight.copy_(families.body(ours).soft_prompt.values)
    with torch.inference_mode():
        if task == "CAUSAL_LM":
            # PEFT gives the prompt's own positions too.
            found = ours(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
            expected = reference(input_ids=IDS, attention_mask=MASK).logits[:, 4:]
            torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], atol=1e-5, rtol=1e-4)
            return
        # PEFT lets the first virtual token stand for the text; ours pools at the text's own first token.
        mine = families.body(ours)(input_ids=IDS, attention_mask=MASK)
        embedded = families.body(theirs).get_input_embeddings()(IDS)
        prompt = families.body(ours).soft_prompt.values.expand(2, -1, -1)
        wide = torch.cat([torch.ones(2, 4, dtype=torch.long), MASK], dim=1)
        whole = families.body(theirs)(inputs_embeds=torch.cat([prompt, embedded], 1), attention_mask=wide)
    torch.testing.assert_close(mine.last_hidden_state, whole.last_hidden_state[:, 4:])
    pooled = families.body(theirs).pooler(whole.last_hidden_state[:, 4:])
    torch.testing.assert_close(mine.pooler_output, pooled)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_what_a_prompt_cannot_do_is_refused(tiny_causal, kind):
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    addons.attach(model, Addon(kind=kind, size=4))
    places = torch.tensor([[0, 1, 2, 0, 1]])  # two examples laid into one row
    with pytest.raises(TuneyardError, match="several examples share a row"):
        model(input_ids=IDS[:1, :5], position_ids=places)
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=9)
    )
    with pytest.raises(TuneyardError, match=f"adapter {kind}: T5.* encoder-decoder"):
        addons.attach(t5, Addon(kind=kind, size=4))


def test_a_file_of_another_model_is_refused(tiny_causal, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_causal)
    addon = Addon(kind="pfeiffer", size=4)
    addons.attach(model, addon)
    moved = {name: weight for name, weight in model.named_parameters() if addons.own(name)}
    gone = sorted(moved)[0]
    del moved[gone]
    addons.save(model, addon, moved | {"stranger": torch.zeros(1)}, tmp_path)
    with pytest.raises(TuneyardError, match=f"{gone} is not in the file; stranger is not in the model"):
        addons.load(AutoModelForCausalLM.from_pretrained(tiny_causal), tmp_path)


LIKE_BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
FAMILIES = {
    "Bert": ("BertForSequenceClassification", LIKE_BERT),
    "Roberta": ("RobertaForSequenceClassification", LIKE_BERT),
    "DistilBert": ("DistilBertForSequenceClassification", {"dim": 16, "hidden_dim": 24, "n_layers": 2}),
    "Llama": ("LlamaForCausalLM", LIKE_BERT),
    "Qwen2": ("Qwen2ForCausalLM", LIKE_BERT),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 16, "n_inner": 24, "n_layer": 2}),
    "T5": ("T5ForConditionalGeneration", {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1}),
    "ViT": ("ViTForImageClassification", LIKE_BERT),
    "Whisper": (
        "WhisperForConditionalGeneration",
        dict(d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_layers=1, decoder_layers=1),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_family_are_found(family):
    import transformers

    name, sizes = FAMILIES[family]
    heads = {
        n: 2
        for n in ("num_attention_heads", "num_key_value_heads", "n_heads", "n_head", "num_heads",
                  "encoder_attention_heads", "decoder_attention_heads")
    }  # fmt: skip
    config_class = getattr(transformers, f"{family}Config")
    known = config_class().to_dict()
    small = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = config_class(**sizes, **small, vocab_size=50, **{n: v for n, v in heads.items() if n in known})
    model = getattr(transformers, name)(config)
    layers = families.layers(model)
    assert len(layers) == 2
    groups = families.groups(model)
    # Every weight in one group; embeddings first, the head last, and a layer's weights in its own.
    assert sorted(n for group in groups for n in group) == sorted(n for n, _ in model.named_parameters())
    for layer, group in zip(layers, groups[1:-1], strict=True):
        assert [n for n in group if n.startswith(f"{layer}.")]
    assert (
        groups[0] and groups[-1] and "embed" in groups[0][0] + "embed" * (family in ("GPT2", "T5", "Whisper"))
    )
    widths = {16}
    for layer in layers.values():
        for patterns in (families.ATTENTION_OUT, families.FEED_FORWARD_OUT):
            (path,) = families.parts(layer, patterns)
            part = layer.get_submodule(path)
            assert {getattr(part, "out_features", None) or part.nf} == widths
        assert families.norms(layer)
    addons.attach(model, Addon(kind="houlsby", size=3))
    assert sum(".bottleneck.up.weight" in n for n, _ in model.named_parameters()) == 4
