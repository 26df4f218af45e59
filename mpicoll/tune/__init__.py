"""Which algorithm is the fastest here: measured once, kept in a file, and used by ``algorithm="auto"``.

``table`` says what is kept and where, ``search`` decides what is worth keeping, ``measure`` takes the times,
``calibrate`` fits the simulator's machine to such times, and ``online`` chooses while a program trains.
"""
