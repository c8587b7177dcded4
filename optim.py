"""From gradients to a step: Muon for the hidden matrices, AdamW for all else; sums over processes."""
import torch
import torch.distributed as dist

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
    inner = lambda name, p: p.ndim > 1 and (name.startswith('blocks.') or '.conv' in name)
    hidden, rest = ([p for n, p in model.named_parameters() if inner(n, p) is x] for x in (True, False))
    return [Muon(hidden, muon_lr), torch.optim.AdamW(rest, lr, (.9, .95), weight_decay=0., fused=True)]


def exchange(model, losses: dict, stop: bool) -> bool:
    """Add up gradients and losses of all processes, in place -> has any of them been told to stop?"""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    parts = [p.grad for p in model.parameters()] + [v.detach() for v in losses.values()]
    flat = torch.cat([*(t.flatten() for t in parts), parts[0].new_tensor([float(stop)])])
    dist.all_reduce(flat)
    for t, total in zip(parts, flat.split([t.numel() for t in parts] + [1])):
        t.copy_(total.view_as(t))
    return flat[-1].item() > 0
