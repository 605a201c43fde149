"""TRL trains a saved folder that it gets by name."""

import pytest

from tests.integrations.hf_folders import folder

pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.mark.filterwarnings("ignore")  # of TRL and the packages that it brings
def test_the_gates_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = folder(tmp_path / "model")
    arguments = trl.SFTConfig(
        str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        disable_tqdm=True, model_init_kwargs={"trust_remote_code": True},
    )  # fmt: skip
    texts = datasets.Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog"}] * 8)
    trainer = trl.SFTTrainer(str(path), arguments, train_dataset=texts)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if "value_gate" in name}
    trainer.train()
    assert before
    after = dict(trainer.model.named_parameters())
    assert all((after[name] - gate).abs().max() > 0 for name, gate in before.items())
