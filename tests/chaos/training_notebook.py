"""The notebook that chaos runs: a real training that takes note of what it printed, and when."""

from __future__ import annotations

from pathlib import Path

from conftest import write_notebook

PARAMETERS = """\
timeout = None
checkpoint_dir = ''
resume = False
printed = ''      # folder in which this notebook notes what it printed, and when
epochs = 30
pace = 0.03       # seconds of a step
flood = ''        # a file whose existence asks for much output, or for a big checkpoint
"""

PREPARE = """\
import hashlib, json, os, random, subprocess, sys, time
from pathlib import Path
from IPython.display import HTML, display
{imports}
from grd.experiment import training

# What must end with the kernel: a child in a session of its own.
child = subprocess.Popen(['sleep', '600'], start_new_session=True)
notes = os.open(Path(printed) / (os.environ['GRD_RUN_ID'] + '-' + os.environ['GRD_ATTEMPT']),
                os.O_WRONLY | os.O_CREAT | os.O_APPEND)
count = 0

def say(text):
    global count
    count += 1
    line = f'<{count:05d}> {text}'
    if count % 7 == 0:
        display(HTML(f'<p>{line}</p>'))
    else:
        print(line, flush=True, file=sys.stderr if count % 5 == 0 else sys.stdout)
    os.write(notes, f'{time.time():.3f} {count}\\n'.encode())

say('prepared')
"""

PLAIN = """\
class Model:
    def __init__(self):
        self.weights = [random.gauss(0, 1) for _ in range(8)]
    def state_dict(self):
        return {'weights': list(self.weights)}
    def load_state_dict(self, state):
        self.weights = list(state['weights'])

class Loader:
    def __iter__(self):
        order = list(range(len(data)))
        random.shuffle(order)
        for start in range(0, len(order), 8):
            yield [data[i] for i in order[start:start + 8]]
    def __len__(self):
        return len(data) // 8

random.seed(20261123)
data = []
for _ in range(80):
    x = [random.gauss(0, 1) for _ in range(8)]
    data.append((x, float(sum(x[:4]) > 0)))
model, loader = Model(), Loader()
state = {'seen': 0, 'blob': b''}

for epoch in training.epochs(epochs, model=model, state=state, checkpoint_dir=checkpoint_dir, resume=resume,
                             seed=7):
    for batch in epoch.steps(loader):
        loss = 0.0
        for x, y in batch:
            score = sum(w * v for w, v in zip(model.weights, x))
            error = 1 / (1 + 2.718281828 ** -max(-30.0, min(30.0, score))) - y
            loss += error * error
            model.weights = [w - 0.05 * error * v + random.gauss(0, 1e-4) for w, v in zip(model.weights, x)]
        state['seen'] += len(batch)
        epoch.mean('loss', loss / len(batch))
        say(f'epoch {int(epoch)} step {epoch.step} loss {loss:.6f}')
        time.sleep(pace)
        if flood and Path(flood).exists():
            if Path(flood).read_text() == 'output':
                print('y' * 400_000, flush=True)
            else:
                state['blob'] = random.Random(1).randbytes(12_000_000)
        elif state['blob']:
            state['blob'] = b''
    epoch.log(loss=epoch.mean('loss'), norm=sum(w * w for w in model.weights), seen=state['seen'])
    say(f'epoch {int(epoch)} done')
final = model.weights
"""

TORCH = """\
torch.set_num_threads(1)
torch.manual_seed(20261123)
x = torch.randn(80, 8)
data = torch.utils.data.TensorDataset(x, (x[:, :4].sum(1) > 0).float())
loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
state = {'seen': 0}

for epoch in training.epochs(epochs, model=model, optimizer=optimizer, scheduler=scheduler, state=state,
                             checkpoint_dir=checkpoint_dir, resume=resume):
    for features, labels in epoch.steps(loader):
        optimizer.zero_grad()
        noisy = features + 0.01 * torch.randn_like(features)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(noisy).squeeze(1), labels)
        loss.backward()
        optimizer.step()
        state['seen'] += len(labels)
        epoch.mean('loss', loss.item())
        say(f'epoch {int(epoch)} step {epoch.step} loss {loss.item():.6f}')
        time.sleep(pace)
    scheduler.step()
    norm = float(sum((p ** 2).sum() for p in model.parameters()))
    epoch.log(loss=epoch.mean('loss'), norm=norm, seen=state['seen'])
    say(f'epoch {int(epoch)} done')
final = [p.tolist() for p in model.parameters()]
"""

RESULT = """\
result = hashlib.sha256(json.dumps([final, training.history, state['seen']]).encode()).hexdigest()
say('RESULT ' + result)
"""

IMPORTS = {
    "plain": "sys.modules['torch'] = None  # as where it is not installed: a start takes 2 s less",
    "torch": "import torch",
}


def write_training(path: Path, kind: str) -> Path:
    """The notebook of ``kind``: ``plain`` (no torch) or ``torch``."""
    training = {"plain": PLAIN, "torch": TORCH}[kind]
    prepare = PREPARE.replace("{imports}", IMPORTS[kind])
    return write_notebook(path, prepare, training, RESULT, parameters=PARAMETERS)
