//! What a paused machine is beside its memory, as a plain value.

use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};

use crate::arch::state::VcpuState;
use crate::machine::{BuildError, Machine, kvm};
use crate::vcpu::lock;
use crate::virtio::pci::VirtioPciState;

/// State of a paused machine. It fits a machine of the same configuration with the same devices, on the same host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineState {
    clock: kvm_clock_data,
    config_address: u32,
    vcpus: Vec<VcpuState>,
    devices: Vec<VirtioPciState>,
}

impl MachineState {
    /// States of the vCPUs.
    pub fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }
}

impl Machine {
    /// Takes the state. The machine must be paused.
    pub fn save(&self) -> Result<MachineState, BuildError> {
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.save().ok_or_else(gone)?.map_err(BuildError::State));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        Ok(MachineState {
            // Last: the vCPUs' clocks are read against it.
            clock: kvm("KVM_GET_CLOCK", self.vm.get_clock())?,
            config_address: self.shared.bus.config_address(),
            vcpus,
            devices: self.devices.iter().map(|device| lock(device).save()).collect(),
        })
    }

    /// Puts a state into this machine, which must be paused and have the devices of the one it was taken from; its memory
    /// must be back already. The guest's clock goes on where it was: the time in between has not passed for it, and
    /// whoever speaks to its agent sets its wall clock.
    pub fn put_back(&mut self, state: &MachineState) -> Result<(), BuildError> {
        if state.devices.len() != self.devices.len() {
            return Err(BuildError::Config("the state has other devices".into()));
        }
        self.set_cpus(state.vcpus.len() as u32)?;
        let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
        kvm("KVM_SET_CLOCK", self.vm.set_clock(&clock))?;
        self.shared.bus.set_config_address(state.config_address);
        for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
            vcpu.restore(state.clone()).ok_or_else(gone)??;
        }
        for (device, state) in self.devices.iter().zip(&state.devices) {
            lock(device).restore(state)?;
        }
        Ok(())
    }
}

fn gone() -> BuildError {
    BuildError::Config("a vCPU's thread has ended".into())
}
