epochs: int = 6
seconds: float = 0.0
# %%
import time

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

pl.seed_everything(0)
x = torch.randn(320, 8)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=32, shuffle=True)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1)
        )

    def training_step(self, batch):
        time.sleep(seconds)
        return torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


model = Net()
# %%
trainer = pl.Trainer(max_epochs=epochs, logger=False, accelerator="cpu", enable_progress_bar=False)
trainer.fit(model, loader)
# %%
import hashlib

numbers = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
print(f"weights sha256 {hashlib.sha256(numbers.numpy().tobytes()).hexdigest()}")
