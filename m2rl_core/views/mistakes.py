"""Notebook 2: mistakes that trainers of this kind have made, and the test that fails on each of them here."""
from __future__ import annotations

import pandas as pd

# (what goes wrong, whose and the report of it, the test in tests/ that fails on it)
MISTAKES = (
    ("log-probs without the sampling temperature", "TRL #4159", "test_grpo::test_gradient_at_another_temperature"),
    ("top-p or top-k while sampling: ratios are off by the mass that was kept", "TRL #6789",
     "test_rollout::test_first_tokens_follow_the_softmax"),
    ("mismatch recorded only after it was truncated", "TRL #5231", "test_grpo::test_mismatch_between_sampler_and_trainer"),
    ("sequence ratio as a product, which vanishes with the length", "TRL #5814", "test_grpo::test_sequence_ratios_by_hand"),
    ("cached keys of the weights before the update", "TRL #3024, pytorch/rl #4016",
     "test_rollout::test_changed_weights_are_used_at_once"),
    ("one of Qwen's two end markers honoured", "TRL #7039",
     "test_rollout::test_both_end_markers_stop_and_the_budget_truncates"),
    ("padding has the end marker's id, so that stopping is never learnt", "TRL #4970, #6357",
     "test_grpo::test_gradient_is_that_of_plain_autograd"),
    ("padding shifts positions or is attended to", "TRL #6800, #2708",
     "test_policy::test_sequences_of_unlike_length_side_by_side"),
    ("a turn's text tokenised again, so that other tokens are trained than were sampled", "TRL #5144",
     "test_rollout::test_sampled_tokens_are_never_tokenised_again"),
    ("a tool's tokens in the loss", "TRL #5144", "test_rollout::test_tools_answers_come_in_unsampled"),
    ("chat template applied twice", "known from several", "test_policy::test_a_prompt_is_wrapped_once"),
    ("later turns without the marker at which the assistant speaks", "known from several",
     "test_policy::test_tool_reply_is_what_the_template_writes"),
    ("groups formed by the prompt's text", "NeMo-RL #4013", "test_grpo::test_rows_of_one_prompt_are_groups_of_their_own"),
    ("std of equal rewards is a residue of rounding, and advantages are thousands", "NeMo-RL #4161",
     "test_grpo::test_equal_scores_give_exactly_nothing"),
    ("groups without variance leave the divisor", "TRL #6365", "test_grpo::test_skipped_groups_do_not_show"),
    ("gradient depends on the micro-batches", "TRL #2617, #3021, #6024", "test_grpo::test_micro_batches_do_not_show"),
    ("gradient depends on the number of processes", "TRL #2995, #6380", "test_grpo::test_processes_do_not_show"),
    ("a mean of means where a token mean is said, or the reverse", "TRL #3187, #3938", "test_grpo::test_reductions_by_hand"),
    ("a sampled KL term with the gradient of the KL the other way round", "GRPO as first published; see DeepSeek-V3.2",
     "test_grpo::test_kl_estimate_has_the_mean_of_the_kl_and_of_its_gradient"),
    ("a KL over the vocabulary as an advantage: its expected gradient is zero", "miles #2362",
     "test_opd::test_a_kl_used_as_an_advantage_teaches_nothing"),
    ("distillation divides by domain or micro-batch", "TRL #6452, #6478",
     "test_opd::test_each_row_learns_from_its_own_domains_teacher"),
    ("logits of all tokens over the whole vocabulary held at once", "TRL #3055, #2255; unsloth #11556",
     "test_opd::test_no_more_than_a_chunk_of_the_vocabulary_is_held"),
    ("a teacher of another vocabulary or shape", "known from several",
     "test_teachers::test_a_teacher_that_does_not_fit_is_named"),
    ("teachers gather gradients", "TRL #6526", "test_opd::test_teachers_gather_no_gradient"),
)


def table() -> pd.DataFrame:
    """The mistakes as a table: what, reported of, and our test."""
    return pd.DataFrame(MISTAKES, columns=["mistake", "reported of", "held off by (tests/)"])
