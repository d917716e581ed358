"""Lloyd's k-means in torch: seeds by k-means++, empty clusters refilled, the same result for the same seed.

It needs torch alone. Every pass sees all points: 500 speech units or 1,024 codes on 10^5 to 10^7 vectors need no
approximation by mini-batches.

M points, K clusters, C components of a vector.
"""

import torch


def kmeans(points: torch.Tensor, num_clusters: int, iterations: int = 30, seed: int = 0) -> torch.Tensor:
    """Find the centroids of `points`.  (M, C) -> (K, C), float32

    Raises:
        ValueError: there are fewer distinct points than clusters.
    """
    points = points.float()
    generator = torch.Generator().manual_seed(seed)
    distinct = points.unique(dim=0)
    if len(distinct) < num_clusters:
        raise ValueError(
            f"{num_clusters} clusters were asked for but there are only {len(distinct)} distinct vectors; "
            "give more data or ask for fewer"
        )

    # Lloyd's steps: assign each point to its nearest centroid, move each centroid to the mean of its points.
    centroids = seed_centroids(distinct, num_clusters, generator)
    for _ in range(iterations):
        assigned, distances = assign(points, centroids)
        counts = torch.bincount(assigned, minlength=num_clusters)
        sums = torch.zeros_like(centroids).index_add_(0, assigned, points)
        updated = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            # An empty cluster takes one of the points that are farthest from their centroids.
            updated[empty] = points[distances.topk(len(empty)).indices]
        if torch.equal(updated, centroids):
            break
        centroids = updated
    return centroids


def seed_centroids(points: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Draw seeds by k-means++: a point's probability is proportional to its squared distance from earlier seeds."""
    if len(points) > 32 * num_clusters:
        points = points[torch.randperm(len(points), generator=generator)[: 32 * num_clusters]]
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distances = (points - points[chosen[0]]).square().sum(1)
    for _ in range(num_clusters - 1):
        chosen.append(int(torch.multinomial(distances + 1e-20, 1, generator=generator)))
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen].clone()


def assign(points: torch.Tensor, centroids: torch.Tensor, chunk: int = 65_536) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the nearest centroid and the squared distance to it.  (M, C), (K, C) -> (M,), (M,)"""
    offsets = centroids.square().sum(1)
    indices, distances = [], []
    for part in points.split(chunk):
        nearest = torch.addmm(offsets, part, centroids.T, alpha=-2).min(1)
        indices.append(nearest.indices)
        distances.append(nearest.values + part.square().sum(1))
    return torch.cat(indices), torch.cat(distances).clamp(min=0)
