epochs: int = 6
seconds: float = 0.0
# %%
import time

import torch
from torch.utils.data import StackDataset
from transformers import Trainer, TrainingArguments, set_seed

set_seed(0)
x = torch.randn(320, 8)
data = StackDataset(x=x, labels=x.sum(1, keepdim=True))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1)
        )

    def forward(self, x, labels):
        time.sleep(seconds)
        return {"loss": torch.nn.functional.mse_loss(self.layers(x), labels)}


model = Net()
arguments = TrainingArguments(
    output_dir="out",
    num_train_epochs=epochs,
    per_device_train_batch_size=32,
    learning_rate=0.01,
    logging_steps=10,
    report_to=[],
    use_cpu=True,
)
# %%
trainer = Trainer(model, arguments, train_dataset=data)
trainer.train()
trainer.save_model()
# %%
import hashlib

numbers = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
print(f"weights sha256 {hashlib.sha256(numbers.numpy().tobytes()).hexdigest()}")
