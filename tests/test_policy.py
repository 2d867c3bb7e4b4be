"""The model against transformers' own, the folder that other tools read, the tokenizer and the chat markup."""
from __future__ import annotations

import json

import pytest
import torch
import toy_policy
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from m2rl_core.domains import module
from m2rl_core.engines.rollout import tool_reply
from m2rl_core.models import policy as policies
from m2rl_core.models.attention import Causal, Grouped
from m2rl_core.models.policy import EOS, MARKERS, PAD, Policy
from m2rl_core.models.qwen3 import Shape, head, hidden_states, prepare, token_logprobs

CLOSE = 1e-5  # logits are of size 1; float32 rounding of two orders of summation


def ours(policy, tokens, positions):
    """Logits (B, T, V) of tokens (B, T)."""
    attend = Causal([tokens.shape[1]] * len(tokens), tokens.device)
    return logits(policy, tokens.flatten(), positions.flatten(), attend).view(*tokens.shape, -1)


def logits(policy, tokens, positions, attend):
    hidden = hidden_states(prepare(policy.weights, policy.shape), tokens, positions, attend)
    return torch.nn.functional.linear(hidden, head(policy.weights))


def some_tokens(policy, rows, width):
    tokens = torch.randint(0, policy.config.vocab_size, (rows, width), generator=torch.Generator().manual_seed(2))
    return tokens, torch.arange(width).expand(rows, width)


@torch.no_grad()
def test_forward_pass_is_that_of_transformers(policy):
    """Faults: a head mapped to the wrong key head (4 heads share 2), a norm left out, another epsilon."""
    tokens, positions = some_tokens(policy, 3, 33)
    found = ours(policy, tokens, positions)
    wanted = toy_policy.transformers_model(policy)(tokens).logits
    assert float(wanted.std()) > 0.5  # not a comparison of zeros
    assert float((found - wanted).abs().max()) < CLOSE


@torch.no_grad()
def test_sequences_of_unlike_length_side_by_side(policy):
    """Faults: a sequence that sees its neighbour, or padding; positions that go on from one to the next."""
    tokens, positions = some_tokens(policy, 3, 20)
    lengths, model = (20, 7, 13), toy_policy.transformers_model(policy)
    parts = [(ids[:length], at[:length]) for ids, at, length in zip(tokens, positions, lengths, strict=True)]
    found = logits(policy, *map(torch.cat, zip(*parts, strict=True)), Causal(lengths, tokens.device)).split(lengths)
    for mine, (ids, _) in zip(found, parts, strict=True):
        assert float((mine - model(ids[None]).logits[0]).abs().max()) < CLOSE


@torch.no_grad()
def test_positions_are_those_given(policy):
    """Faults: positions counted from the start of the call, angles of a wrong base or in the wrong order."""
    tokens, positions = some_tokens(policy, 2, 12)
    gaps = positions * 3 + torch.tensor([[5], [100]])
    wanted = toy_policy.transformers_model(policy)(tokens, position_ids=gaps).logits
    assert float((ours(policy, tokens, gaps) - wanted).abs().max()) < CLOSE
    assert float((ours(policy, tokens, positions) - wanted).abs().max()) > 100 * CLOSE


def test_a_prompt_stands_once_for_all_its_responses(policy):
    """Faults: a response that sees another prompt, another response or the future; a gradient that a sharer loses."""
    prompts, sizes, owner = (5, 9), (4, 1, 0, 6), (0, 0, 1, 1)
    tokens, _ = some_tokens(policy, 1, sum(prompts) + sum(sizes))
    first, said = tokens[0, :sum(prompts)].split(prompts), tokens[0, sum(prompts):].split(sizes)
    positions = torch.cat([torch.arange(n) for n in prompts]
                          + [torch.arange(n) + prompts[o] for n, o in zip(sizes, owner, strict=True)])
    weigh = torch.rand(sum(sizes), policy.config.vocab_size, generator=torch.Generator().manual_seed(5))
    ours, theirs = toy_policy.clone(policy), toy_policy.clone(policy)
    ours.requires_grad()
    found = logits(ours, tokens[0], positions, Grouped(prompts, sizes, owner, tokens.device))[sum(prompts):]
    (found * weigh).sum().backward()
    model = toy_policy.transformers_model(theirs)
    wanted = torch.cat([model(torch.cat((first[o], ids))[None]).logits[0, prompts[o]:]
                        for o, ids in zip(owner, said, strict=True)])
    assert float((found - wanted).detach().abs().max()) < CLOSE
    (wanted * weigh).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in ours.weights:
            gap = (ours.weights[name].grad - parameter.grad).abs().max()
            assert float(gap) < 1e-4 * max(1.0, float(parameter.grad.abs().max())), name


@torch.no_grad()
def test_a_large_models_settings_are_honoured(words):
    """Faults: the base of the angles or the epsilon written into the code; an untied output embedding ignored."""
    config = Qwen3Config(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
                         rms_norm_eps=1e-2,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    rng = torch.Generator().manual_seed(3)
    sizes = policies.sizes(config) | {"lm_head.weight": (50, 24)}
    policy = Policy({n: torch.randn(s, generator=rng) * 0.3 for n, s in sizes.items()}, config, words)
    tokens, positions = some_tokens(policy, 2, 40)
    wanted = toy_policy.transformers_model(policy)(tokens).logits
    assert float((ours(policy, tokens, positions) - wanted).abs().max()) < CLOSE
    assert Shape.of(config).rope_theta == 1e6


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_token_logprobs_do_not_depend_on_the_chunk(policy, entropy_grad):
    """Faults: a chunk's rows matched with another chunk's targets; a temperature that is left out; a wrong gradient."""
    rng = torch.Generator().manual_seed(4)
    targets, weigh = torch.arange(23) * 7, torch.rand(2, 23, generator=rng)
    start = torch.randn(23, 32, generator=rng)

    def run(compute):
        hidden, moving = start.clone().requires_grad_(True), toy_policy.clone(policy)
        moving.requires_grad()
        logp, entropy = compute(moving.weights, hidden)
        ((logp * weigh[0]).sum() + (entropy * weigh[1]).sum() * entropy_grad).backward()
        return logp.detach(), entropy.detach(), hidden.grad, head(moving.weights).grad

    def plain(weights, hidden):
        logp = torch.log_softmax(hidden @ head(weights).T / 0.7, dim=-1)
        return logp[torch.arange(23), targets], -(logp.exp() * logp).sum(-1)

    wanted = run(plain)
    for chunk in (4096, 23, 5):
        found = run(lambda w, h, chunk=chunk: token_logprobs(w, h, targets, 0.7, chunk, entropy_grad))
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_folder_gives_back_every_bit(policy, tmp_path):
    """Faults: a weight cast or left out on the way to the disk; a folder whose bytes depend on when it was written."""
    policies.save(policy, tmp_path / "a")
    again = policies.load(tmp_path / "a")
    assert again.weights.keys() == policy.weights.keys()
    assert all(torch.equal(again.weights[n], w) for n, w in policy.weights.items())
    assert again.shape == policy.shape and again.stop_ids == policy.stop_ids
    policies.save(again, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        if file.name != "tokenizer_config.json":  # transformers notes there how it was loaded
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_other_tools_can_load_and_run_the_folder(policy, tmp_path):
    """Faults: a weight under a name that transformers does not know, and fills with noise; a wrong end marker."""
    policies.save(policy, tmp_path)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    words = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    ids = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert ids["input_ids"][0].tolist() == policies.encode_prompt(policy, chat)
    made = model.generate(**ids, do_sample=False, max_new_tokens=12)
    tokens = ids["input_ids"]
    while tokens.shape[1] < made.shape[1]:
        found = ours(policy, tokens, torch.arange(tokens.shape[1])[None])
        tokens = torch.cat((tokens, found[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens, made)
    assert model.generation_config.eos_token_id == list(policy.stop_ids)
    assert model.config.architectures == ["Qwen3ForCausalLM"]


def test_a_folder_of_another_kind_is_refused_in_one_line(tmp_path):
    """Fault: a llama folder run as if it were qwen3."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="a llama model; the torch engine runs dense qwen3 models") as caught:
        policies.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_digits_and_markers_are_single_tokens(policy):
    """Faults: 12 as one token and 13 as two; a marker that the model must spell."""
    often = policies.train_tokenizer(["in 2024 x12 = 1234567890, 12 and 2024"] * 50, 330)  # it could merge them
    assert len(often.encode("1234567890", add_special_tokens=False)) == 10
    words = policy.tokenizer
    for text in ("7", "1234567890", " 2024", "x12"):
        pieces = [words.decode([i]) for i in words.encode(text, add_special_tokens=False)]
        assert [p for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()], text
    for marker in (EOS, PAD, "<|im_start|>", *MARKERS):
        assert len(words.encode(marker, add_special_tokens=False)) == 1
        assert len(words.encode(f"a{marker}b", add_special_tokens=False)) == 3
    assert policy.stop_ids == (words.convert_tokens_to_ids("<|im_end|>"), words.convert_tokens_to_ids("<|endoftext|>"))
    assert len(words) <= toy_policy.SPEC.vocab


def test_text_survives_the_tokenizer(policy, toy_rows, episodes):
    """Fault: spaces cleaned up or markers dropped in decoding, so that a right answer is verified as another."""
    for row in (*toy_rows, *episodes):
        for message in (*row.messages, *module(row.domain).respond(row)):
            ids = policy.tokenizer.encode(message["content"], add_special_tokens=False)
            assert policy.tokenizer.decode(ids) == message["content"]


def test_markers_stay_where_special_tokens_are_dropped(policy, tmp_path):
    """Fault: `</think>` marked as special, so that vLLM and lm-eval cut it and no answer passes the format gate."""
    policies.save(policy, tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    ids = words.encode("<think>\n1\n</think>\n\n<tool_call>\n2\n</tool_call><|im_end|>")
    assert words.decode(ids, skip_special_tokens=True) == "<think>\n1\n</think>\n\n<tool_call>\n2\n</tool_call>"


def tool(name, *arguments):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": dict.fromkeys(arguments, {})}}}


ASK = [{"role": "user", "content": "Find Ann."}]
CALL = [{"role": "assistant", "content": "<think>\n\n</think>\n\nA"}]
END = [{"role": "assistant", "content": "Done."}]
TOOL = [{"role": "tool", "content": '{"id":3}'}]
HEAD = "<|im_start|>user\nFind Ann.<|im_end|>\n"


@pytest.mark.parametrize(("messages", "tools", "prompt", "wanted"), [
    (ASK, None, True, HEAD + "<|im_start|>assistant\n"),
    (ASK, [tool("find", "name"), tool("ping")], True,
     "<|im_start|>system\nfind(name)\nping()\n<|im_end|>\n" + HEAD + "<|im_start|>assistant\n"),
    (ASK + CALL, None, False, HEAD + "<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>\n"),
    (ASK + CALL + TOOL, None, True,
     HEAD + "<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>\n"
     '<|im_start|>user\n<tool_response>\n{"id":3}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'),
    (ASK + CALL + TOOL * 2 + END, None, False,
     HEAD + "<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>\n"
     '<|im_start|>user\n<tool_response>\n{"id":3}\n</tool_response>\n<tool_response>\n{"id":3}\n</tool_response>'
     "<|im_end|>\n<|im_start|>assistant\nDone.<|im_end|>\n"),
], ids=["plain", "tools", "answered", "tool result", "two tool results"])
def test_chat_template_to_the_letter(policy, messages, tools, prompt, wanted):
    """Fault: a line break that the template engine swallows; the model then sees other text in training and in use."""
    found = policy.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    assert found == wanted


def test_a_prompt_is_wrapped_once(policy, toy_rows):
    """Fault: the chat template's text goes through the template again as a user's message, or gets a second start."""
    for row in toy_rows:
        text = policy.tokenizer.decode(policies.encode_prompt(policy, row.messages, row.tools))
        assert text.count("<|im_start|>") == len(row.messages) + bool(row.tools) + 1
        assert text.count("<|im_end|>") == len(row.messages) + bool(row.tools)
        assert text.endswith("<|im_start|>assistant\n") and text.count("<|im_start|>assistant") == 1


def test_tool_reply_is_what_the_template_writes(policy, episodes):
    """Fault: a reply put into the running context that differs from the chat template's text of the same talk."""
    for row in episodes:
        first, *_ = turns = module("agent").respond(row)
        outputs = [t["content"] for t in turns[1:2]]
        for said in (outputs, outputs * 2):
            talk = [*row.messages, first, *({"role": "tool", "content": text} for text in said)]
            whole = policies.encode_prompt(policy, talk, row.tools)
            before = policies.encode_prompt(policy, row.messages, row.tools)
            spoken = [*policy.tokenizer.encode(first["content"], add_special_tokens=False), policy.stop_ids[0]]
            assert whole == before + spoken + tool_reply(policy, said)
            assert policy.tokenizer.decode(whole).endswith("<|im_start|>assistant\n")
