"""The orchestrator room: which model stands on which device, and bringing it there.

Above it: gateways and the command line, over the placement contract. Below it: Ray, the workers'
lifecycle contract and the model store. It never sees a prompt or a token.
"""
