epochs: int = 6
seconds: float = 0.0
# %%
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(320, 8)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
# %%
for epoch in range(epochs):
    for batch, target in loader:
        loss = nn.functional.mse_loss(model(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(seconds)
    print(f"epoch {epoch}: loss {loss.item():.4f}")
# %%
import hashlib

numbers = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
print(f"weights sha256 {hashlib.sha256(numbers.numpy().tobytes()).hexdigest()}")
