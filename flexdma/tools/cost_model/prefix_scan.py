"""Schedules of an exclusive prefix scan over ranks, and a simulation of when each rank has the state of all earlier ranks.

Each rank first has the state of its own tokens.  Joining two states that follow one another is associative, so:

    doubling    in round k each rank sends what it has of its last 2^k ranks to the rank 2^k after it (Hillis and Steele,
                "Data Parallel Algorithms", 1986): ceil(log2 P) rounds, floor(log2 r) + 1 messages to rank r
    chain       each rank joins its own state to what it received and sends that to the next: P - 1 rounds, one message each
"""

from collections.abc import Callable, Sequence

Rounds = list[list[tuple[int, int]]]  # the (source, destination) of each message, by round


def doubling(ranks: int) -> Rounds:
    """The rounds of the log-depth schedule."""
    rounds, distance = [], 1
    while distance < ranks:
        rounds.append([(rank, rank + distance) for rank in range(ranks - distance)])
        distance *= 2
    return rounds


def chain(ranks: int) -> Rounds:
    """The rounds of the sequential schedule."""
    return [[(rank, rank + 1)] for rank in range(ranks - 1)]


def received_messages(rounds: Rounds, ranks: int) -> list[int]:
    """The number of messages that each rank receives."""
    counts = [0] * ranks
    for messages in rounds:
        for _, destination in messages:
            counts[destination] += 1
    return counts


def simulated(
    rounds: Rounds, ready: Sequence[float], message_seconds: Callable[[int, int], float], join_seconds: float
) -> list[float]:
    """When each rank has the state of all earlier ranks, in seconds.

    ready: when each rank has the state of its own tokens.  message_seconds(source, destination): of one message.
    A rank sends after it has joined what it received in earlier rounds, one message at a time, while it receives.
    """
    done, sent = list(ready), [0.0] * len(ready)
    for messages in rounds:
        arrivals = []
        for source, destination in messages:
            sent[source] = max(done[source], sent[source]) + message_seconds(source, destination)
            arrivals.append((destination, sent[source]))
        for destination, arrival in arrivals:
            done[destination] = max(done[destination], arrival) + join_seconds
    return done
