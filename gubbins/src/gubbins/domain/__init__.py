"""Domain model: pilot states, rules of compute elements, fair shares, job matching, errors and the clock."""
