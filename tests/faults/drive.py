"""train.py with a fault, for ranks under torchrun: FAULT names a function of this file."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import train
from trainer import Trainer


def nan_batch_of_rank_1() -> None:
    """What rank 1 sees at step 5 is not finite."""
    inner = Trainer.micro_loss

    def micro_loss(self, images, labels):
        loss, metrics = inner(self, images, labels)
        return (loss * torch.nan if (self.step, self.ranks.rank) == (5, 1) else loss), metrics

    Trainer.micro_loss = micro_loss


if __name__ == "__main__":
    globals()[os.environ["FAULT"]]()
    train.main()
