# SPDX-License-Identifier: Apache-2.0
"""A VMM on the software host: scenarios, fault injection, measurement."""
