"""Losses once more, in plain loops and float64."""

import math


def softmax(logits, temperature):
    """exp(z / T) over its sum; the largest one is taken out first."""
    highest = max(logits)
    exponents = [math.exp((z - highest) / temperature) for z in logits]
    return [x / math.fsum(exponents) for x in exponents]


def cross_entropy(logits, label):
    return -math.log(softmax(logits, 1.0)[label])


def kl(student, teacher, temperature):
    """T^2 sum_v p (log p - log q)."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def kl_slope(student, teacher, temperature):
    """Its derivative by each logit of the student: T (q - p)."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return [temperature * (b - a) for a, b in zip(p, q, strict=True)]


def mean_over_streams(rows_by_stream):
    """Each stream's own mean, then the mean of those."""
    return math.fsum(math.fsum(rows) / len(rows) for rows in rows_by_stream) / len(rows_by_stream)
