"""A hand-split checkpoint resumed with one group, in the frameworks that load it."""

from typing import Any

import pytest
import torch

from selective_optim.checkpoint import group_names, merge_groups
from tests.support.compare import assert_same
from tests.support.framework_cases import batches, hand_split

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

MESSAGE = (
    r"^the loaded state dict has 2 groups, split by hand by weight_decay \(0\.\d+ and "
    r"0\), and this optimizer has 1 group\. Load merge_groups\(state_dict, group_names"
    r"\(groups, model\), order=\[n for n, _ in model\.named_parameters\(\)\]\) of "
    r"selective_optim\.checkpoint instead; groups are the param_groups of your old "
    r"optimizer\.$"
)


def test_trainer_resuming_from_its_own_two_groups_is_told(tmp_path):
    """The Trainer's own optimizer has two groups: the commonest checkpoint there is."""
    pytest.importorskip("transformers")
    from selective_optim import AdamW
    from tests.test_frameworks_transformers import llama, trainer

    first = trainer(llama(), tmp_path)
    first.args.weight_decay = 0.1
    first.train()
    assert len(first.optimizer.param_groups) == 2
    model = llama()
    optimizer = AdamW(model.parameters(), weight_decay=0.1, wd_policy="huggingface")
    second = trainer(model, tmp_path, optimizers=(optimizer, None))
    checkpoint = tmp_path / "checkpoint-4"
    with pytest.raises(ValueError, match=MESSAGE):
        second.train(resume_from_checkpoint=str(checkpoint))

    # As the page on the Trainer says: the Trainer's own groups name the parameters.
    own = trainer(llama(), tmp_path / "own")
    own.create_optimizer()
    names = group_names(own.optimizer.param_groups, own.model)
    state_dict = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    order = [n for n, _ in model.named_parameters()]
    merged = merge_groups(state_dict, names, order=order)
    torch.save(merged, checkpoint / "optimizer.pt")
    schedule = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    one = {k: v[:1] if isinstance(v, list) else v for k, v in schedule.items()}
    torch.save(one, checkpoint / "scheduler.pt")
    model = llama()
    optimizer = AdamW(
        model.parameters(), lr=5e-5, weight_decay=0.1, wd_policy="huggingface"
    )
    second = trainer(model, tmp_path, optimizers=(optimizer, None))
    second.train(resume_from_checkpoint=str(checkpoint))
    assert_same(model, first.model)


def test_lightning_resuming_from_two_groups_is_told(tmp_path):
    pytest.importorskip("lightning")
    from tests.test_frameworks_lightning import HandSplit, Selective, loader, trainer

    first = trainer(tmp_path, 1)
    first.fit(HandSplit(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match=MESSAGE):
        trainer(tmp_path, 2).fit(
            Selective(), loader(), ckpt_path=str(tmp_path / "half.ckpt")
        )


def test_accelerate_resuming_from_two_groups_is_told(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from tests.test_frameworks_accelerate import network, selective

    def prepared(make: Any) -> Any:
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        return accelerator, *accelerator.prepare(model, make(model))

    accelerator, model, optimizer = prepared(
        lambda model: torch.optim.AdamW(hand_split(model), weight_decay=0.04)
    )
    [(inputs, labels)] = batches(1, 8, 4)
    accelerator.backward(torch.nn.functional.cross_entropy(model(inputs), labels))
    optimizer.step()
    accelerator.save_state(str(tmp_path))
    with pytest.raises(ValueError, match=MESSAGE):
        prepared(selective)[0].load_state(str(tmp_path))
