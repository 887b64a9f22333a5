"""``disagg-proxy calibrate``: an engine profile (:mod:`disagg_sim.step_model`) from running engines, by HTTP only.

fit      the profile's figures from measured times; pure
measure  requests to an engine, and their times
cli      the command
"""
