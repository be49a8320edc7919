"""The network: RADIO tower -> pixel shuffle -> projector -> fusion -> hybrid language model. Single device, no training."""
