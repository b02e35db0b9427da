epochs: int = 6
seconds: float = 0.0
# %%
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier

np.random.seed(0)
X, y = load_digits(return_X_y=True)
classes = np.arange(10)
model = SGDClassifier(loss="log_loss", random_state=0)
# %%
for epoch in range(epochs):
    for batch in np.array_split(np.random.permutation(len(X)), 8):
        model.partial_fit(X[batch] / 16, y[batch], classes=classes)
        time.sleep(seconds)
    print(f"epoch {epoch}: accuracy {model.score(X / 16, y):.4f}")
# %%
import hashlib

print(f"weights sha256 {hashlib.sha256(model.coef_.tobytes()).hexdigest()}")
