"""The network: RADIO tower -> pixel shuffle -> projector -> fusion -> hybrid language model; no training."""
