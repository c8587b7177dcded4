"""From gradients to a step: Muon for hidden matrices, AdamW for all else, sums over processes."""
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from data import UserError

def orthogonalize(G, steps=5):
    """Roughly the nearest orthogonal matrices, by Newton-Schulz (Jordan et al. 2024); G [n, a, b]."""
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    X = X if (wide := X.shape[-2] <= X.shape[-1]) else X.mT
    for _ in range(steps):
        A = X @ X.mT                                                                  # [n,min,min]
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X if wide else X.mT

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: all directions of a matrix move equally far (Jordan et al. 2024).
    torch.optim.Muon always computes in bfloat16, 100 times slower than float32 on a CPU without bfloat16
    units; this one keeps the type of the weights. Of a convolution all axes but the first are one."""

    def __init__(self, params, lr, momentum=.95, decay=.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    m = self.state[p].setdefault('momentum', torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group['momentum'])
                    by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(m, group['momentum'])))
            for same in by_shape.values():
                U = orthogonalize(torch.stack([u.flatten(1) for _, u in same]))       # [n,a,b]
                scale = max(1, U.shape[-2] / U.shape[-1]) ** .5
                for (p, _), u in zip(same, U):
                    p.mul_(1 - group['lr'] * group['decay'])
                    p.add_(u.view_as(p), alpha=-group['lr'] * scale)

def optimizers(model, lr, muon_lr):
    """Muon for the hidden matrices and convolutions of blocks, AdamW for all else."""
    hidden = model.hidden_matrices()
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    return [Muon(hidden, muon_lr), torch.optim.AdamW(rest, lr, (.9, .95), weight_decay=0., fused=True)]

# ---- several processes, started by torchrun: each works on its part of every batch ----
def join(device):
    """Become one of them, on a GPU of its own."""
    gpus, mine = torch.cuda.device_count(), int(os.environ['LOCAL_RANK'])
    if device.type == 'cuda':
        if mine >= gpus:
            raise UserError(f'torchrun started more processes than GPUs: --nproc_per_node={gpus}')
        torch.cuda.set_device(mine)
    how = 'nccl' if device.type == 'cuda' else 'gloo'
    dist.init_process_group(how, timeout=timedelta(hours=4))       # while one decodes a folder

def wait():
    """Until all processes are here; without torchrun nothing happens."""
    if dist.is_available() and dist.is_initialized():
        together(dist.barrier)

def together(call, *args):
    try:
        call(*args)
    except RuntimeError as e:
        raise UserError(f'another process has ended, see its message ({str(e)[:60]})')

def exchange(model, losses: dict, stop: bool) -> bool:
    """Add up gradients and losses of all processes, in place -> has any of them been told to stop?"""
    params = list(model.parameters())
    flags = [params[0].new_tensor([p.grad is not None for p in params] + [stop])]
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    parts = [p.grad for p in params] + [v.detach() for v in losses.values()] + flags
    flat = torch.cat([t.flatten() for t in parts])
    together(dist.all_reduce, flat)
    for t, total in zip(parts, flat.split([t.numel() for t in parts])):
        t.copy_(total.view_as(t))
    *used, stop = flags[0].tolist()
    for p, count in zip(params, used):
        p.grad = p.grad if count else None             # as in one process: no gradient, no step
    return stop > 0
