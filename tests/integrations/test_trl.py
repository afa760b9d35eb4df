"""TRL's DPO and GRPO trainers on our ops: their numbers where they are right, and the shift they lack."""

import copy

import pytest
import torch

trl = pytest.importorskip("trl", minversion="1.16.0")
if trl.__version__ != "1.16.0":
    pytest.skip("written for trl 1.16.0", allow_module_level=True)

from datasets import Dataset  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from ivl_kernels.commands.subject import random_tokenizer  # noqa: E402
from ivl_kernels.integrations.trl import GSPOTrainer, MPOTrainer, serve_fused_head  # noqa: E402
from ivl_kernels.nn import GSPOLoss, MPOLoss, RewardShift  # noqa: E402
from ivl_kernels.testing import tiny  # noqa: E402
from tests.models import inputs, native_model  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    made = random_tokenizer()
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def model_of(tokenizer, family=Qwen3ForCausalLM, **changes):
    config = tiny.text_config("qwen3", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **changes)
    model = tiny.randomize(family(config))
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("kind", ["qwen3", "internvl"])
def test_the_fused_head_equals_trls(tokenizer, kind):
    model = native_model("qwen3") if kind == "internvl" else model_of(tokenizer).eval()
    batch = inputs(((2,), (1, 1), ()))
    if kind != "internvl":
        batch.pop("pixel_values")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :9] = -100
    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    for temperature in (1.0, 0.7):
        theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
        add_fused_lm_head(theirs, temperature=temperature, outputs=fields)
        add_fused_lm_head(ours, temperature=temperature, outputs=fields)
        edit = serve_fused_head(ours, temperature=temperature, top=True)
        a = theirs(**batch, labels=labels, fused_lm_head=True)
        b = ours(**batch, labels=labels, fused_lm_head=True)
        for name in (*fields[:3], "loss"):
            torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=2e-5)
        assert torch.equal(b.is_top1 & a.label_mask, a.is_top1 & a.label_mask) and torch.equal(
            a.label_mask, b.label_mask
        )
        a.log_probs.square().sum().backward()
        b.log_probs.square().sum().backward()
        for (name, p), q in zip(theirs.named_parameters(), ours.parameters()):
            if p.grad is not None:
                assert (p.grad - q.grad).norm() <= 1e-4 * p.grad.norm() + 1e-4, name
        plain = model(**batch).logits
        assert torch.equal(ours(**batch).logits, plain)
        edit.roll_back()
        assert torch.equal(ours(**batch, labels=labels, fused_lm_head=True).log_probs, a.log_probs)


def test_refused(tokenizer):
    model = model_of(tokenizer)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="changes its logits by final_logit_softcapping"):
        serve_fused_head(model)


def pairs():
    text = ["one", "two cups", "a spoon on the table", "three blue things"]
    rows = [
        {"prompt": f"How many {t}?", "chosen": f" {t} {i}", "rejected": f" not {t} at all"} for i, t in enumerate(text)
    ]
    return Dataset.from_list(rows)


def dpo(
    kind, model, tokenizer, path, steps=3, losses=("sigmoid", "bco_pair", "sft"), weights=(0.8, 0.2, 1.0), **options
):
    extra = {name: options.pop(name) for name in ("mpo", "callbacks") if name in options}
    args = trl.DPOConfig(
        output_dir=str(path), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        loss_type=list(losses), loss_weights=list(weights), beta=0.1, logging_steps=1, gradient_checkpointing=False,
        save_strategy=options.pop("save_strategy", "no"), save_steps=1, **options,
    )  # fmt: skip
    reference = copy.deepcopy(model)
    with torch.no_grad():  # not the policy itself, so that rewards are not 0
        for p in reference.parameters():
            p.mul_(1.01)
    return kind(model, reference, args=args, train_dataset=pairs(), processing_class=tokenizer, **extra)


def weights_of(trainer, **options):
    trainer.train(**options)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, trainer.state.log_history


class NoShift(RewardShift):
    def update(self, chosen, rejected):
        return torch.zeros(())


def test_mpo_without_shift_equals_trls(tokenizer, tmp_path):
    theirs, log = weights_of(dpo(trl.DPOTrainer, model_of(tokenizer), tokenizer, tmp_path))
    ours, our_log = weights_of(dpo(MPOTrainer, model_of(tokenizer), tokenizer, tmp_path, mpo=MPOLoss(shift=NoShift())))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(log, our_log):
        for name in ("loss", "rewards/margins", "logits/chosen", "mean_token_accuracy", "entropy"):
            if name in a:
                assert b[name] == pytest.approx(a[name], abs=2e-3), name


def test_the_shift_is_the_running_mean(tokenizer, tmp_path):
    trainer = dpo(MPOTrainer, model_of(tokenizer), tokenizer, tmp_path)
    weights, log = weights_of(trainer)
    steps = [entry for entry in log if "rewards/shift" in entry]
    means = [(entry["rewards/chosen"] + entry["rewards/rejected"]) / 2 for entry in steps]
    for i, entry in enumerate(steps):
        assert entry["rewards/shift"] == pytest.approx(sum(means[: i + 1]) / (i + 1), abs=1e-3)
    plain, _ = weights_of(dpo(trl.DPOTrainer, model_of(tokenizer), tokenizer, tmp_path))
    assert any(not torch.equal(plain[name], value) for name, value in weights.items())


def test_resumes_with_its_shift(tokenizer, tmp_path):
    whole, _ = weights_of(dpo(MPOTrainer, model_of(tokenizer), tokenizer, tmp_path / "a", steps=4))
    first = dpo(MPOTrainer, model_of(tokenizer), tokenizer, tmp_path / "b", steps=2, save_strategy="steps")
    first.train()
    second = dpo(MPOTrainer, model_of(tokenizer), tokenizer, tmp_path / "b", steps=4)
    resumed, _ = weights_of(second, resume_from_checkpoint=True)
    assert second.mpo.shift._state[1] == 4
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-7)


def test_other_losses_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="loss_type: got 'ipo'"):
        dpo(MPOTrainer, model_of(tokenizer), tokenizer, tmp_path, losses=("ipo",), weights=(1.0,))


def reward(completions, **_):
    return [float(len(text) % 5) for text in completions]


def grpo(kind, model, tokenizer, path, **options):
    args = trl.GRPOConfig(
        output_dir=str(path), max_steps=2, per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True,
        bf16=False, disable_tqdm=True, save_strategy="no", logging_steps=1, beta=0.0, num_iterations=2, seed=1,
        gradient_checkpointing=False,
        **{"importance_sampling_level": "sequence", **options}, loss_type="grpo", epsilon=3e-4, epsilon_high=4e-4,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": f"Say {i}"} for i in range(4)])
    return kind(model, reward_funcs=reward, args=args, train_dataset=rows, processing_class=tokenizer)


def test_gspo_equals_trls_and_ours(tokenizer, tmp_path):
    theirs, _ = weights_of(grpo(trl.GRPOTrainer, model_of(tokenizer), tokenizer, tmp_path))
    trainer, seen = grpo(GSPOTrainer, model_of(tokenizer), tokenizer, tmp_path), []
    stock, score = trainer._compute_loss, trainer._get_per_token_logps_and_entropies

    def scored(*args, **kwargs):
        found = score(*args, **kwargs)
        if torch.is_grad_enabled():
            seen.append(found[0])
        return found

    def compared(model, batch):
        seen.clear()
        value = stock(model, batch)
        logp, mask = seen[-1], batch["completion_mask"].bool()
        old = batch.get("old_per_token_logps")
        old = logp.detach() if old is None else old
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        ours = GSPOLoss(empty="zero")(logp[mask], old[mask], offsets, batch["advantages"]).loss
        torch.testing.assert_close(value, ours, rtol=1e-4, atol=1e-6)
        return value

    trainer._get_per_token_logps_and_entropies, trainer._compute_loss = scored, compared
    ours, log = weights_of(trainer)
    assert seen and any("clip_ratio/region_mean" in entry for entry in log)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="importance_sampling_level='token'"):
        grpo(GSPOTrainer, model_of(tokenizer), tokenizer, tmp_path, importance_sampling_level="token")
