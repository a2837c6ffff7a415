//! What a vCPU is, as a plain value.
//!
//! Order matters when it is put back:
//! 1. the TSC's frequency and CPUID, on which the rest is checked;
//! 2. whether it runs (`MP_STATE`), registers, segments and control registers;
//! 3. XSAVE area, then XCR0, then debug registers;
//! 4. the local APIC, *then* the MSRs: a write to `IA32_TSC_DEADLINE` is dropped while the APIC timer is not in deadline
//!    mode, and the guest would wait for ever;
//! 5. of the MSRs the TSC before its deadline, which comes last of all: it counts in the TSC's time;
//! 6. pending events.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, Msrs, Xsave, kvm_cpuid_entry2,
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// In `RFLAGS`.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// State of one vCPU that does not run and has no I/O half done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// `None` where KVM does not tell.
    tsc_khz: Option<u32>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// The XSAVE area; longer than 4096 bytes where the guest has large features (AMX).
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// Why a state could not be taken or put back.
#[derive(Debug, thiserror::Error)]
#[error("vCPU state: {what}: {source}")]
pub struct StateError {
    what: &'static str,
    source: kvm_ioctls::Error,
}

fn step<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, StateError> {
    result.map_err(|source| StateError { what, source })
}

/// What both directions need to know of the host.
#[derive(Debug, Clone)]
pub struct StateContext {
    msr_indices: Vec<u32>,
    xsave_bytes: usize,
}

impl StateContext {
    /// Asks KVM for its list of MSRs and the size of the XSAVE area.
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, StateError> {
        let msr_indices = step("list of MSRs", kvm.get_msr_index_list())?.as_slice().to_vec();
        let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self { msr_indices, xsave_bytes: xsave_bytes.max(size_of::<kvm_xsave>()) })
    }

    fn empty_xsave(&self) -> Result<Xsave, StateError> {
        let extra = (self.xsave_bytes - size_of::<kvm_xsave>()).div_ceil(4);
        Xsave::new(extra).map_err(|_| StateError { what: "XSAVE area", source: kvm_ioctls::Error::new(libc::ENOMEM) })
    }
}

/// What a vCPU is doing, in words: for a guest that stands still, whether it runs, whether an interrupt would reach it, and
/// whether its timer is to come.
pub fn describe(vcpu: &VcpuFd) -> String {
    let words = || {
        let doing = match vcpu.get_mp_state()?.mp_state {
            KVM_MP_STATE_RUNNABLE => "runs",
            KVM_MP_STATE_HALTED => "is halted",
            _ => return Ok("was not started".to_owned()),
        };
        let regs = vcpu.get_regs()?;
        let interrupts = if regs.rflags & INTERRUPT_FLAG == 0 { "off" } else { "on" };
        let entry = |index| kvm_msr_entry { index, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry(IA32_TSC), entry(IA32_TSC_DEADLINE)])
            .map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        vcpu.get_msrs(&mut msrs)?;
        let timer = match msrs.as_slice() {
            [_, deadline] if deadline.data == 0 => "no timer".to_owned(),
            [now, deadline] => format!("timer in {} cycles", deadline.data.wrapping_sub(now.data).cast_signed()),
            _ => "timer unknown".to_owned(),
        };
        Ok(format!("{doing} at {:#x}, interrupts {interrupts}, {timer}", regs.rip))
    };
    words().unwrap_or_else(|error: kvm_ioctls::Error| format!("cannot be looked at: {error}"))
}

impl VcpuState {
    /// Takes the state. `MP_STATE` comes first because reading it may change the others (a pending INIT is acted on).
    pub fn save(vcpu: &VcpuFd, context: &StateContext) -> Result<Self, StateError> {
        let mp_state = step("MP_STATE", vcpu.get_mp_state())?;
        let mut xsave = context.empty_xsave()?;
        // SAFETY: the area is as long as KVM said that it needs (`KVM_CAP_XSAVE2`).
        step("XSAVE", unsafe { vcpu.get_xsave2(&mut xsave) })?;
        let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
        words.extend(xsave.as_slice());
        Ok(Self {
            cpuid: step("CPUID", vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().ok(),
            mp_state,
            regs: step("registers", vcpu.get_regs())?,
            sregs: step("special registers", vcpu.get_sregs())?,
            xsave: words,
            xcrs: step("XCRs", vcpu.get_xcrs())?,
            debug_regs: step("debug registers", vcpu.get_debug_regs())?,
            lapic: step("local APIC", vcpu.get_lapic())?,
            msrs: save_msrs(vcpu, &context.msr_indices)?,
            events: step("events", vcpu.get_vcpu_events())?,
        })
    }

    /// Puts the state into a fresh vCPU of a machine whose memory and clock are back already.
    pub fn restore(&self, vcpu: &VcpuFd, context: &StateContext) -> Result<(), StateError> {
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| StateError { what: "CPUID", source: kvm_ioctls::Error::new(libc::E2BIG) })?;
        step("CPUID", vcpu.set_cpuid2(&cpuid))?;
        if let Some(khz) = self.tsc_khz {
            step("TSC frequency", vcpu.set_tsc_khz(khz))?;
        }
        step("MP_STATE", vcpu.set_mp_state(self.mp_state))?;
        step("registers", vcpu.set_regs(&self.regs))?;
        step("special registers", vcpu.set_sregs(&self.sregs))?;
        self.restore_xsave(vcpu, context)?;
        step("XCRs", vcpu.set_xcrs(&self.xcrs))?;
        step("debug registers", vcpu.set_debug_regs(&self.debug_regs))?;
        step("local APIC", vcpu.set_lapic(&self.lapic))?;
        restore_msrs(vcpu, &self.msrs)?;
        step("events", vcpu.set_vcpu_events(&self.events))
    }

    /// General registers, for whoever looks at a crash.
    pub fn regs(&self) -> &kvm_regs {
        &self.regs
    }

    fn restore_xsave(&self, vcpu: &VcpuFd, context: &StateContext) -> Result<(), StateError> {
        let mut xsave = context.empty_xsave()?;
        let length = 1024 + xsave.as_slice().len();
        if self.xsave.len() != length {
            return Err(StateError { what: "length of the XSAVE area", source: kvm_ioctls::Error::new(libc::EINVAL) });
        }
        // SAFETY: only elements are written, the length stays.
        let area = unsafe { xsave.as_mut_fam_struct() };
        area.xsave.region.copy_from_slice(&self.xsave[..1024]);
        xsave.as_mut_slice().copy_from_slice(&self.xsave[1024..]);
        // SAFETY: the area is as long as KVM said that it reads (`KVM_CAP_XSAVE2`).
        step("XSAVE", unsafe { vcpu.set_xsave2(&xsave) })
    }
}

/// Reads each MSR by itself: KVM lists some that this host or this guest does not have, and stops at the first it refuses.
fn save_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut saved = Vec::with_capacity(indices.len());
    for &index in indices {
        let mut msrs = one_msr(kvm_msr_entry { index, ..Default::default() })?;
        if step("MSRs", vcpu.get_msrs(&mut msrs))? == 1 {
            saved.extend_from_slice(msrs.as_slice());
        }
    }
    // A deadline of zero means that the timer has fired: let it fire again rather than be lost between the two reads.
    let tsc = saved.iter().find(|msr| msr.index == IA32_TSC).map(|msr| msr.data);
    if let (Some(tsc), Some(deadline)) = (tsc, saved.iter_mut().find(|msr| msr.index == IA32_TSC_DEADLINE))
        && deadline.data == 0
    {
        deadline.data = tsc;
    }
    saved.sort_by_key(|msr| msr.index == IA32_TSC_DEADLINE);
    Ok(saved)
}

/// Writes each MSR by itself. One that was readable and is refused now is not worth a machine: it had its reset value.
fn restore_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), StateError> {
    for msr in msrs {
        step("MSRs", vcpu.set_msrs(&one_msr(*msr)?))?;
    }
    Ok(())
}

fn one_msr(entry: kvm_msr_entry) -> Result<Msrs, StateError> {
    Msrs::from_entries(&[entry]).map_err(|_| StateError { what: "MSRs", source: kvm_ioctls::Error::new(libc::E2BIG) })
}
