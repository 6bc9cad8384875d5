"""LaTRO's parts inside of other libraries' trainers; imported when asked for."""
