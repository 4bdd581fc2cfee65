"""Domain model: pilot states, rules of compute elements, demand and fair shares, job matching, circuit breakers,
downtimes, errors and the clock."""
